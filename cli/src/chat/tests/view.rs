//! What is on the screen, at sizes from nothing to far too much.

use std::time::Duration;

use crossterm::event::{KeyCode, KeyModifiers};
use stentor_client::{Connection, Reason};

use super::{Chat, MINUTE, NOON, id, message};
use crate::chat::{
    conversation::Fate,
    model::Input,
    row::{Row, Said},
    text::columns,
};

fn talk(chat: &mut Chat) {
    chat.listed(&[("tea", 6, 3), ("work", 2, 0)]);
    let day_before = NOON - 24 * 60 * MINUTE;
    let rows = vec![
        Row {
            said: Said::Notice("ann created the conversation".into()),
            stamp_ms: day_before,
            ..message(1, "ann", "")
        },
        Row { stamp_ms: day_before + MINUTE, ..message(2, "bob", "good morning") },
        message(3, "ann", "三つの文字と e\u{301} and 👨\u{200d}👩\u{200d}👧"),
        message(4, "carol", "esc \u{1b}[31m and a long line that has to be wrapped somewhere because it does not fit"),
        Row { said: Said::Bytes("‹5 B, not UTF-8: caf\\xe9\\n›".into()), ..message(5, "bob", "") },
        Row { said: Said::Action("waves".into()), ..message(6, "bob", "") },
    ];
    chat.page("tea", rows, 6);
    chat.page("work", vec![message(1, "dave", "x"), message(2, "dave", "שלום")], 2);
}

fn opened(columns: u16, rows: u16) -> Chat {
    let mut chat = Chat::new(columns, rows);
    talk(&mut chat);
    chat.press(KeyCode::Enter);
    chat
}

#[test]
fn a_usual_screen() {
    let mut chat = opened(80, 24);
    chat.write("half a thought");
    let expected = [
        "# tea                     │tea  3 participants  tea",
        "  * bob waves             │",
        "# work                   2│",
        "  dave: שלום              │",
        "                          │            the conversation begins here",
        "                          │────────────────── Tue 24 Nov 2026 ──────────────────",
        "                          │14:00 --       ann created the conversation",
        "                          │14:01 bob      good morning",
        "                          │────────────────── Wed 25 Nov 2026 ──────────────────",
        "                          │13:03 ann      三つの文字と e\u{301} and 👨\u{200d}👩\u{200d}👧                ✓",
        "                          │──────────────────────── new ────────────────────────",
        "                          │13:04 carol    esc ␛[31m and a long line that has",
        "                          │               to be wrapped somewhere because it",
        "                          │               does not fit",
        "                          │13:05 bob      ‹5 B, not UTF-8: caf\\xe9\\n›",
        "                          │13:06 *        bob waves",
        "                          │> half a thought",
        "● gateway-1                                                  ann/cli-1 · F1 help",
    ];
    let screen: Vec<String> = chat.screen().into_iter().filter(|row| row != "                          │").collect();
    assert_eq!(screen.join("\n"), expected.join("\n"));
}

#[test]
fn a_tiny_screen_shows_one_thing_at_a_time() {
    let mut chat = Chat::new(20, 5);
    talk(&mut chat);
    assert_eq!(chat.screen(), ["# tea              3", "# work             2", "", "", "● gateway-1"]);
    chat.press(KeyCode::Enter);
    chat.write("hi");
    assert_eq!(chat.screen(), ["bob ‹5 B, not", "UTF-8: caf\\xe9\\n›", "* bob waves", "> hi", "● gateway-1"]);
    chat.press(KeyCode::Tab);
    assert_eq!(chat.screen()[0], "# tea");
}

#[test]
fn a_huge_screen_has_room_for_every_seq() {
    let chat = opened(200, 60);
    let screen = chat.screen();
    let row =
        |text: &str| screen.iter().find(|row| row.contains(text)).unwrap_or_else(|| panic!("{screen:#?}")).clone();
    assert!(row("三つの文字").ends_with("✓ 3"));
    assert!(row("good morning").ends_with('2'));
    assert_eq!(columns(&row("三つの文字")), 200);
}

#[test]
fn every_size_can_be_drawn_with_everything_on_it() {
    let mut chat = opened(80, 24);
    chat.write("三三三三三三三三三三 and some more");
    chat.press(KeyCode::Enter);
    chat.write("👨\u{200d}👩\u{200d}👧\u{301}");
    chat.input(Input::Answered { conversation: id("tea"), number: 1, fate: Fate::Unknown("x".into()) });
    for dialog in [None, Some('n'), Some('t'), Some('?')] {
        chat.press(KeyCode::Esc);
        match dialog {
            Some('?') => chat.press(KeyCode::F(1)),
            Some(c) => chat.key(KeyCode::Char(c), KeyModifiers::CONTROL),
            None => {}
        }
        for columns in (0..30).chain([49, 50, 51, 80, 200]) {
            for rows in (0..12).chain([24, 60]) {
                chat.resize(columns, rows);
                chat.screen();
                chat.press(KeyCode::PageUp);
                chat.screen();
                chat.press(KeyCode::PageDown);
                chat.press(KeyCode::Tab);
                chat.screen();
                chat.press(KeyCode::Tab);
            }
        }
    }
}

#[test]
fn no_wide_glyph_is_cut_in_two() {
    for width in 1..80 {
        let chat = opened(width, 24);
        let buffer = chat.buffer();
        for y in 0..24 {
            for x in 0..width {
                let wide = columns(buffer[(x, y)].symbol());
                assert!(u16::try_from(wide).unwrap() + x <= width.max(1), "{x} {y} of {width}");
            }
        }
    }
}

#[test]
fn a_lost_connection_and_the_way_back_are_shown() {
    let mut chat = opened(80, 24);
    let state = |chat: &Chat| chat.screen()[23].clone();
    let offline = |lasted, retry_ms| Connection::Offline {
        lasted: Duration::from_secs(lasted),
        retry_in: Duration::from_millis(retry_ms),
        reason: Some("timed\u{1b} out".into()),
    };
    chat.input(Input::Tick(offline(75, 2_100)));
    assert!(
        state(&chat).starts_with("○ reconnecting in 3 s; no connection for 1 min 15 s (timed␛ out)"),
        "{}",
        state(&chat)
    );
    chat.input(Input::Tick(offline(76, 0)));
    assert!(state(&chat).starts_with("○ connecting; no connection for 1 min 16 s"));
    chat.input(Input::Incoming(stentor_client::Incoming::Connected { gateway: "gateway-2".into() }));
    chat.online();
    assert!(state(&chat).starts_with("◐ gateway-1, catching up"));
    chat.input(Input::Incoming(stentor_client::Incoming::UpToDate));
    assert!(state(&chat).starts_with("● gateway-1 "));
}

#[test]
fn marks_tell_what_became_of_a_message() {
    let mut chat = opened(200, 24);
    for text in ["one", "two", "three", "four"] {
        chat.write(text);
        chat.press(KeyCode::Enter);
    }
    let mut answer = |number, fate| chat.input(Input::Answered { conversation: id("tea"), number, fate });
    answer(1, Fate::Acknowledged(7));
    answer(2, Fate::Refused("the body is over the limit".into()));
    answer(3, Fate::Unknown("no answer".into()));
    chat.now_ms += 12_000;
    chat.online();
    let screen = chat.screen();
    let ends = |text: &str, mark: &str| {
        let row = screen.iter().find(|row| row.contains(text)).unwrap_or_else(|| panic!("{text}: {screen:#?}"));
        assert!(row.ends_with(mark), "{row:?}");
    };
    ends(" you            one ", "✓ 7");
    ends(" you            two ", "✗");
    ends(" you            three ", "?");
    ends(" you            four ", "… 12 s");
    ends("not sent: the body", "the body is over the limit");
    ends("perhaps sent", "no answer");
}

#[test]
fn who_was_removed_sees_why_nothing_comes() {
    let mut chat = opened(130, 24);
    let refusal = Reason::NotAParticipant.refusal();
    chat.input(Input::Incoming(stentor_client::Incoming::Ended { conversation: id("tea"), refusal }));
    assert!(chat.screen()[22].contains("NOT_A_PARTICIPANT"), "{:?}", chat.screen());
}
