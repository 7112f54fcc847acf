//! What follows from what happens.

use std::time::Duration;

use crossterm::event::{KeyCode, KeyModifiers};
use stentor_client::{Connection, Incoming, Reason, UserId};

use super::{Chat, NOON, id, message};
use crate::chat::{
    conversation::{Fate, Page, Place, RowKey},
    model::{Dialog, Effect, Focus, Input},
};

/// A chat with the conversation "c" open, 100 messages, all of them read.
fn opened() -> Chat {
    let mut chat = Chat::new(80, 24);
    chat.listed(&[("c", 100, 100)]);
    chat.press(KeyCode::Enter);
    chat.serve("c", 100);
    chat.take_effects();
    chat
}

fn streamed(chat: &mut Chat, seq: u64, sender: &str, by_us: bool) {
    let row = message(seq, sender, &format!("m{seq}"));
    let effects = &mut Vec::new();
    chat.model.conversations.get_mut("c").unwrap().streamed(row, by_us);
    chat.effects.append(effects);
    chat.online();
}

fn window(chat: &Chat) -> (u64, u64) {
    let c = &chat.model.conversations["c"];
    assert!(c.rows().iter().zip(c.rows().iter().skip(1)).all(|(a, b)| a.to + 1 == b.from), "dense");
    (c.first, c.last)
}

#[test]
fn each_listed_conversation_gets_a_stream_and_its_newest_page() {
    let mut chat = Chat::new(80, 24);
    assert!(chat.take_effects().contains(&Effect::List));
    chat.listed(&[("c", 100, 90), ("d", 0, 0)]);
    let effects = chat.take_effects();
    let page = |before| Page::Before(before);
    assert!(effects.contains(&Effect::Subscribe(id("c"))) && effects.contains(&Effect::Subscribe(id("d"))));
    assert!(effects.contains(&Effect::Load { conversation: id("c"), page: page(101), limit: 20, urgent: false }));
    assert!(!effects.iter().any(|e| matches!(e, Effect::Load { conversation, .. } if *conversation == id("d"))));
    assert_eq!(chat.model.conversations["c"].unread(), 10);
    assert_eq!(chat.model.conversations["d"].unread(), 0);
}

#[test]
fn the_list_is_asked_for_again_but_never_twice_at_once_nor_without_a_connection() {
    let mut chat = Chat::new(80, 24);
    chat.take_effects();
    chat.now_ms += 60_000;
    chat.online();
    assert_eq!(chat.take_effects(), [], "one is under way");
    chat.listed(&[]);
    chat.now_ms += 60_000;
    let (lasted, retry_in) = (Duration::ZERO, Duration::ZERO);
    chat.input(Input::Tick(Connection::Offline { lasted, retry_in, reason: None }));
    assert_eq!(chat.take_effects(), []);
    chat.online();
    assert_eq!(chat.take_effects(), [Effect::List]);
}

#[test]
fn opening_reads_and_older_pages_come_until_the_screen_is_full() {
    let mut chat = Chat::new(80, 24);
    chat.listed(&[("c", 100, 90)]);
    chat.page("c", (81..=100).map(|n| message(n, "bob", "x")).collect(), 100);
    assert_eq!(chat.model.conversations["c"].unread(), 10, "nobody has looked");
    chat.take_effects();
    chat.press(KeyCode::Enter);
    let effects = chat.take_effects();
    assert!(effects.contains(&Effect::Read(id("c"), 100)), "{effects:?}");
    assert_eq!(chat.asked("c"), Some(Page::Before(81)));
    assert_eq!(chat.model.conversations["c"].marker, Some(90));
    chat.serve("c", 100);
    assert!(window(&chat).0 < 81);
}

#[test]
fn nothing_is_read_while_nobody_looks() {
    let mut chat = opened();
    chat.input(Input::Focus(false));
    streamed(&mut chat, 101, "bob", false);
    assert!(!chat.take_effects().iter().any(|e| matches!(e, Effect::Read(..))));
    chat.input(Input::Focus(true));
    assert!(chat.take_effects().contains(&Effect::Read(id("c"), 101)));
    chat.press(KeyCode::PageUp);
    streamed(&mut chat, 102, "bob", false);
    assert!(!chat.take_effects().iter().any(|e| matches!(e, Effect::Read(..))), "the end is not in view");
}

#[test]
fn only_what_was_here_without_a_gap_is_delivered() {
    let mut chat = opened();
    streamed(&mut chat, 101, "bob", false);
    assert!(!chat.take_effects().iter().any(|e| matches!(e, Effect::Delivered(..))), "1 to 40 were never here");
    for _ in 0..60 {
        chat.press(KeyCode::PageUp);
        chat.serve("c", 101);
    }
    assert_eq!(window(&chat), (1, 101));
    assert!(chat.take_effects().contains(&Effect::Delivered(id("c"), 101)));
    streamed(&mut chat, 102, "bob", false);
    assert_eq!(chat.model.conversations.get_mut("c").unwrap().deliver(), None, "told already");
    assert!(chat.take_effects().contains(&Effect::Delivered(id("c"), 102)));
}

#[test]
fn the_place_is_kept_when_older_pages_come_and_newer_events_follow() {
    let mut chat = opened();
    for _ in 0..4 {
        chat.press(KeyCode::PageUp);
    }
    let before = chat.screen();
    assert!(chat.asked("c").is_some(), "an older page is needed");
    chat.serve("c", 100);
    streamed(&mut chat, 101, "bob", false);
    let after = chat.screen();
    let talk =
        |screen: &[String]| screen[3..20].iter().map(|row| row.chars().skip(27).collect()).collect::<Vec<String>>();
    assert_eq!(talk(&before), talk(&after));
    chat.resize(60, 24);
    chat.resize(80, 24);
    assert_eq!(talk(&after), talk(&chat.screen()), "a resize there and back");
    chat.key(KeyCode::End, KeyModifiers::CONTROL);
    assert!(chat.screen()[21].contains("m101"), "{:?}", chat.screen());
}

#[test]
fn scrolling_down_by_lines_ends_at_the_end_and_follows_it() {
    let mut chat = opened();
    chat.key(KeyCode::Up, KeyModifiers::CONTROL);
    chat.key(KeyCode::Up, KeyModifiers::CONTROL);
    assert!(matches!(chat.model.opened().unwrap().place, Place::At { row: RowKey::Seq(_), .. }));
    chat.key(KeyCode::Down, KeyModifiers::CONTROL);
    chat.key(KeyCode::Down, KeyModifiers::CONTROL);
    assert_eq!(chat.model.opened().unwrap().place, Place::End);
}

#[test]
fn a_failed_page_is_asked_for_again_a_little_later() {
    let mut chat = Chat::new(80, 24);
    chat.listed(&[("c", 100, 100)]);
    chat.press(KeyCode::Enter);
    let page = chat.asked("c").unwrap();
    chat.input(Input::Page { conversation: id("c"), page, result: Err("no leader".into()) });
    assert_eq!(chat.asked("c"), None);
    assert!(chat.model.notice.as_ref().unwrap().0.contains("no leader"));
    chat.now_ms += 10_000;
    chat.online();
    assert_eq!(chat.asked("c"), Some(Page::Before(101)));
}

#[test]
fn a_page_that_was_not_asked_for_changes_nothing() {
    let mut chat = opened();
    let before = window(&chat);
    let rows = vec![message(7, "bob", "x")];
    chat.input(Input::Page { conversation: id("c"), page: Page::Before(8), result: Ok((rows, 100)) });
    assert_eq!(window(&chat), before);
}

#[test]
fn a_message_waits_is_acknowledged_and_becomes_its_event() {
    let mut chat = opened();
    chat.write("hello");
    chat.press(KeyCode::Enter);
    let text = "hello".to_owned();
    let send = Effect::Send { conversation: id("c"), number: 1, text, is_action: false };
    assert_eq!(chat.take_effects(), [send]);
    let sending = |chat: &Chat| chat.model.opened().unwrap().to_show().map(|s| s.fate.clone()).collect::<Vec<_>>();
    assert_eq!(sending(&chat), [Fate::Waiting]);
    let acknowledged = Fate::Acknowledged(101);
    chat.input(Input::Answered { conversation: id("c"), number: 1, fate: acknowledged.clone() });
    assert_eq!(sending(&chat), [acknowledged]);
    streamed(&mut chat, 101, "ann", true);
    assert_eq!(sending(&chat), []);
    assert!(chat.model.opened().unwrap().sending.is_empty());
}

#[test]
fn an_event_that_comes_before_its_answer_is_not_shown_twice() {
    let mut chat = opened();
    for _ in 0..2 {
        chat.write("x");
        chat.press(KeyCode::Enter);
    }
    streamed(&mut chat, 101, "ann", true);
    assert_eq!(chat.model.opened().unwrap().to_show().map(|s| s.number).collect::<Vec<_>>(), [2]);
    chat.input(Input::Answered { conversation: id("c"), number: 1, fate: Fate::Acknowledged(101) });
    assert_eq!(chat.model.opened().unwrap().to_show().map(|s| s.number).collect::<Vec<_>>(), [2]);
    streamed(&mut chat, 102, "ann", false);
    assert_eq!(chat.model.opened().unwrap().to_show().count(), 1, "that was ann on another device");
}

#[test]
fn what_was_refused_stays_until_it_is_forgotten() {
    let mut chat = opened();
    chat.write("x");
    chat.press(KeyCode::Enter);
    chat.input(Input::Answered {
        conversation: id("c"),
        number: 1,
        fate: Fate::Refused("no (PERMISSION_DENIED)".into()),
    });
    assert!(chat.screen().iter().any(|row| row.contains("not sent: no (PERMISSION_DENIED)")));
    chat.press(KeyCode::Esc);
    assert!(chat.model.opened().unwrap().sending.is_empty());
    assert_eq!(chat.model.focus, Focus::Composer, "it forgot, and did nothing else");
}

#[test]
fn whoever_leaves_with_unanswered_messages_is_asked_once() {
    let mut chat = opened();
    chat.write("x");
    chat.press(KeyCode::Enter);
    chat.take_effects();
    chat.key(KeyCode::Char('c'), KeyModifiers::CONTROL);
    assert_eq!(chat.take_effects(), []);
    chat.press(KeyCode::Left);
    chat.key(KeyCode::Char('c'), KeyModifiers::CONTROL);
    assert_eq!(chat.take_effects(), [], "another key was between");
    chat.key(KeyCode::Char('c'), KeyModifiers::CONTROL);
    assert_eq!(chat.take_effects(), [Effect::Leave]);
    assert_eq!(chat.model.waiting(), 1);
}

#[test]
fn a_superseded_session_ends_the_chat() {
    let mut chat = opened();
    let refusal = Reason::SessionSuperseded.refusal();
    chat.input(Input::Ended(Some(refusal.clone())));
    assert_eq!(chat.take_effects(), [Effect::Leave]);
    assert_eq!(chat.model.ended, Some(refusal));
}

#[test]
fn conversations_are_begun_and_users_taken_in() {
    let mut chat = opened();
    let control = |chat: &mut Chat, c| chat.key(KeyCode::Char(c), KeyModifiers::CONTROL);
    let user = |name| UserId::new(name).unwrap();
    for (said, effect) in [
        ("bob", Effect::Create { id: None, with: vec![user("bob")] }),
        (" bob  carol ann", Effect::Create { id: None, with: vec![user("bob"), user("carol")] }),
        ("#tea bob", Effect::Create { id: Some(id("tea")), with: vec![user("bob")] }),
    ] {
        control(&mut chat, 'n');
        chat.write(said);
        chat.press(KeyCode::Enter);
        assert_eq!(chat.take_effects(), [effect]);
        assert_eq!(chat.model.dialog, None);
    }
    control(&mut chat, 'n');
    chat.write("a/b");
    chat.press(KeyCode::Enter);
    assert!(chat.take_effects().is_empty() && matches!(chat.model.dialog, Some(Dialog::New(_))), "no such user id");
    chat.press(KeyCode::Esc);
    control(&mut chat, 't');
    chat.write("dave");
    chat.press(KeyCode::Enter);
    assert_eq!(chat.take_effects(), [Effect::Add { conversation: id("c"), user: user("dave") }]);
    chat.input(Input::Created(Ok(stentor_client::Conversation { conversation: "tea".into(), ..Default::default() })));
    assert_eq!(chat.model.open, Some(id("tea")));
    assert!(chat.take_effects().contains(&Effect::Subscribe(id("tea"))));
}

#[test]
fn a_conversation_nobody_listed_appears_with_its_first_word() {
    let mut chat = opened();
    let state = |head| Incoming::State {
        conversation: id("new"),
        head,
        delivered: stentor_client::Seq(0),
        read: stentor_client::Seq(0),
    };
    chat.input(Input::Incoming(state(stentor_client::Seq(3))));
    assert_eq!(chat.model.order.len(), 2);
    assert_eq!(chat.model.conversations["new"].unread(), 3);
}

#[test]
fn what_is_kept_of_a_conversation_is_bounded_and_comes_again() {
    let mut chat = opened();
    chat.now_ms = NOON;
    // Nobody looks at it: the newest hundred are kept.
    chat.listed(&[("d", 0, 0)]);
    chat.model.open(&id("d"));
    for seq in 101..=400 {
        streamed(&mut chat, seq, "bob", false);
    }
    assert_eq!(window(&chat), (301, 400));
    chat.model.open(&id("c"));
    // Somebody scrolls up while more comes than is kept: the end is let go.
    for seq in 401..=30_000 {
        streamed(&mut chat, seq, "bob", false);
        if seq == 500 {
            chat.press(KeyCode::PageUp);
        }
    }
    let c = &chat.model.conversations["c"];
    assert!(c.rows().len() <= 20_000 && !c.has_end(), "{}", c.rows().len());
    assert_eq!(c.unread(), 30_000 - 500);
    chat.key(KeyCode::End, KeyModifiers::CONTROL);
    chat.serve("c", 30_000);
    assert_eq!(window(&chat).1, 30_000);
    assert_eq!(chat.model.conversations["c"].unread(), 0);
}

#[test]
fn too_long_a_text_is_not_taken() {
    let mut chat = opened();
    chat.input(Input::Paste("x".repeat(100_000)));
    assert!(chat.model.opened().unwrap().draft.is_empty());
    assert!(chat.model.notice.is_some());
    chat.input(Input::Paste("a\r\nb".into()));
    assert_eq!(chat.model.opened().unwrap().draft.text(), "a\nb");
    chat.key(KeyCode::Enter, KeyModifiers::ALT);
    chat.key(KeyCode::Char('j'), KeyModifiers::CONTROL);
    chat.write("/me");
    assert_eq!(chat.model.opened().unwrap().draft.text(), "a\nb\n\n/me");
}

#[test]
fn an_action_is_sent_as_one() {
    let mut chat = opened();
    chat.write("/me waves");
    chat.press(KeyCode::Enter);
    let text = "waves".to_owned();
    assert_eq!(chat.take_effects(), [Effect::Send { conversation: id("c"), number: 1, text, is_action: true }]);
    chat.write("   ");
    chat.press(KeyCode::Enter);
    assert_eq!(chat.take_effects(), [], "blanks are not sent");
}
