//! The file that keeps cursors: what survives a torn write, and what is found in a file that is none.

use proptest::prelude::*;
use stentor_proto::ids::{AppId, DeviceId, UserId};

use super::*;

fn identity(device: &str) -> Identity {
    Identity {
        app: AppId::new("app").unwrap(),
        user: UserId::new("ann").unwrap(),
        device: DeviceId::new(device).unwrap(),
    }
}

fn id(n: u64) -> ConversationId {
    ConversationId::new(format!("conversation-{n}")).unwrap()
}

fn delivered(n: u64, seq: u64) -> Change {
    Change::Delivered(id(n), Seq(seq))
}

fn sends(n: u64, last: u64, done: u64) -> Change {
    Change::Sends { conversation: id(n), last: SendNo(last), done: SendNo(done) }
}

fn log(dir: &Path) -> PathBuf {
    dir.join("cursors.log")
}

#[test]
fn what_was_saved_is_there_after_a_restart_and_never_moves_back() {
    let dir = tempfile::tempdir().unwrap();
    let store = FileCursors::open(dir.path()).unwrap();
    store.bind(&identity("phone")).unwrap();
    store.save(&[delivered(1, 7), delivered(1, 5), sends(2, 9, 8), sends(2, 3, 3)]).unwrap();
    drop(store);
    let store = FileCursors::open(dir.path()).unwrap();
    assert_eq!(store.delivered(&id(1)), Some(Seq(7)));
    assert_eq!(store.sends(&id(2)), Some((SendNo(3), SendNo(3))));
    assert_eq!((store.delivered(&id(2)), store.sends(&id(1))), (None, None));
    store.bind(&identity("phone")).unwrap();
    assert!(matches!(store.bind(&identity("laptop")), Err(StoreError::OtherDevice { .. })));
}

#[test]
fn one_process_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let store = FileCursors::open(dir.path()).unwrap();
    assert!(matches!(FileCursors::open(dir.path()), Err(StoreError::InUse { .. })));
    drop(store);
    FileCursors::open(dir.path()).unwrap();
}

#[test]
fn other_files_and_newer_formats_are_refused_and_left_alone() {
    for (content, newer) in [(&b"something else"[..], false), (b"STNC\x02rest", true), (b"x", false)] {
        let dir = tempfile::tempdir().unwrap();
        fs::write(log(dir.path()), content).unwrap();
        match FileCursors::open(dir.path()) {
            Err(StoreError::Format { format: 2, .. }) => assert!(newer),
            Err(StoreError::Damaged { .. }) => assert!(!newer),
            other => panic!("{other:?}"),
        }
        assert_eq!(fs::read(log(dir.path())).unwrap(), content);
    }
}

#[test]
fn a_log_of_history_is_rewritten_and_nothing_is_lost_meanwhile() {
    let dir = tempfile::tempdir().unwrap();
    let store = FileCursors::open(dir.path()).unwrap();
    store.bind(&identity("phone")).unwrap();
    for seq in 1..=4_000 {
        store.save(&[delivered(seq % 3, seq), sends(1, seq, seq)]).unwrap();
    }
    let before = fs::metadata(log(dir.path())).unwrap().len();
    // Between taking the content and swapping the files, saving goes on.
    let content = {
        let mut log = store.log.lock();
        log.since = Some(Vec::new());
        log.content()
    };
    store.save(&[delivered(1, 5_000)]).unwrap();
    store.replace(&content).unwrap();
    assert!(fs::metadata(log(dir.path())).unwrap().len() < before / 100);
    store.save(&[delivered(2, 6_000)]).unwrap();
    store.sync().unwrap();
    drop(store);
    let store = FileCursors::open(dir.path()).unwrap();
    let expected = [Some(Seq(3_999)), Some(Seq(5_000)), Some(Seq(6_000))];
    assert_eq!([0, 1, 2].map(|n| store.delivered(&id(n))), expected);
    assert_eq!(store.sends(&id(1)), Some((SendNo(4_000), SendNo(4_000))));
    store.bind(&identity("phone")).unwrap();
    assert!(store.bind(&identity("laptop")).is_err(), "whose it is survives");
}

#[test]
fn sync_rewrites_by_itself() {
    let dir = tempfile::tempdir().unwrap();
    let store = FileCursors::open(dir.path()).unwrap();
    (1..=3_000).for_each(|seq| store.save(&[delivered(1, seq)]).unwrap());
    store.sync().unwrap();
    assert!(fs::metadata(log(dir.path())).unwrap().len() < 200);
    assert_eq!(store.delivered(&id(1)), Some(Seq(3_000)));
}

#[test]
fn every_flipped_bit_costs_later_records_at_most() {
    let dir = tempfile::tempdir().unwrap();
    let store = FileCursors::open(dir.path()).unwrap();
    store.bind(&identity("phone")).unwrap();
    (1..=3).for_each(|seq| store.save(&[delivered(1, seq)]).unwrap());
    drop(store);
    let good = fs::read(log(dir.path())).unwrap();
    for bit in HEADER_BYTES * 8..good.len() * 8 {
        let mut bytes = good.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        fs::write(log(dir.path()), &bytes).unwrap();
        let store = FileCursors::open(dir.path()).unwrap();
        assert!(store.delivered(&id(1)).unwrap_or_default() < Seq(3), "bit {bit}");
        // It can be written on.
        store.save(&[delivered(1, 9)]).unwrap();
        drop(store);
        assert_eq!(FileCursors::open(dir.path()).unwrap().delivered(&id(1)), Some(Seq(9)), "bit {bit}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn a_crash_leaves_what_was_there_at_some_moment(
        steps in prop::collection::vec((0..3u64, 1..50u64), 1..30),
        cut in 0.0..1.0f64,
        garbage: Vec<u8>,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let store = FileCursors::open(dir.path()).unwrap();
        store.bind(&identity("phone")).unwrap();
        let mut moments = vec![Table::default()];
        for &(n, seq) in &steps {
            store.save(&[delivered(n, seq)]).unwrap();
            let mut table = Table(moments.last().unwrap().0.clone());
            table.apply(&delivered(n, seq));
            moments.push(table);
        }
        drop(store);
        let mut bytes = fs::read(log(dir.path())).unwrap();
        bytes.truncate((bytes.len() as f64 * cut) as usize);
        if bytes.len() >= HEADER_BYTES {
            bytes.extend_from_slice(&garbage);
        }
        fs::write(log(dir.path()), &bytes).unwrap();
        let store = FileCursors::open(dir.path()).unwrap();
        let found: Vec<_> = (0..3).map(|n| store.delivered(&id(n))).collect();
        let known = |t: &Table| (0..3).map(|n| t.get(&id(n)).delivered).collect::<Vec<_>>();
        prop_assert!(moments.iter().any(|t| known(t) == found), "{found:?}");
    }
}
