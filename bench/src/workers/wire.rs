//! Orders and words as they travel between processes. Bytes from outside must never panic here, nor make anything larger
//! than their own bound: every number, name and histogram is checked before it is used.

use std::time::Duration;

use stentor_proto::internal::{
    BenchAlive, BenchBegin, BenchClosed, BenchCounted, BenchCut, BenchEnd, BenchFailed, BenchGo, BenchHello, BenchLive,
    BenchMeter, BenchOrder, BenchPart, BenchPrepared, BenchReady, BenchSpent, BenchStop, BenchTally, BenchWelcome,
    BenchWord, bench_order::Order as WireOrder, bench_word::Word as WireWord,
};

use super::{
    link::{MAX_WORKERS, Order, Turns, Word},
    merge::Part,
};
use crate::{BenchError, Histogram, Pace, Spent, histogram::MOST_VALUES, meter::Tally};

/// Of the messages and of the works in them; both sides must have the same.
pub(super) const FORMAT: u32 = 1;
/// A worker takes no longer order.
pub(super) const MAX_ORDER_BYTES: usize = 64 * 1024;
/// A coordinator takes no longer word: four histograms in which every bucket is full, and room.
pub(super) const MAX_WORD_BYTES: usize = 2 * 1024 * 1024;
/// More buckets than a histogram has.
const MAX_BUCKETS: usize = 32_768;
/// Meters besides the units.
const MAX_METERS: usize = 4;
const MAX_NAME_BYTES: usize = 32;
/// Of an error's text; the rest is cut off.
const MAX_ERROR_CHARS: usize = 500;
/// Of a machine's description.
const MAX_MACHINE_BYTES: usize = 4 * 1024;
/// A part is no longer than that.
const MAX_ELAPSED: Duration = Duration::from_secs(30 * 86_400);
/// Tasks of one worker.
const MAX_TASKS: u32 = 16_000_000;

/// What a coordinator begins a run with.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Hello {
    pub(super) cluster_id: String,
    pub(super) run: String,
    pub(super) place: usize,
    pub(super) watched: bool,
    /// JSON.
    pub(super) work: Vec<u8>,
}

/// Why a worker does not take a run: codes that stay the same.
pub(super) mod reason {
    /// It serves another coordinator.
    pub(in super::super) const BUSY: &str = "WORKER_BUSY";
    /// The two programs, or their messages, are of different versions.
    pub(in super::super) const VERSION: &str = "VERSION_DIFFERS";
    /// Its folder is that of another cluster.
    pub(in super::super) const CLUSTER: &str = "WRONG_CLUSTER";
    /// Everything else.
    pub(in super::super) const FAILED: &str = "FAILED";
}

/// What a worker says, beside its words to the coordinator's run.
#[derive(Debug)]
pub(super) enum Heard {
    Word(Word),
    Failed { reason: String, message: String },
    Alive,
}

fn wrong(what: &str) -> BenchError {
    BenchError::Protocol(format!("what came cannot be understood: {what}"))
}

pub(super) fn hello(hello: Hello) -> BenchOrder {
    let version = env!("CARGO_PKG_VERSION").into();
    let Hello { cluster_id, run, place, watched, work } = hello;
    let (place, work) = (place as u32, work.into());
    let hello = BenchHello { format: FORMAT, version, cluster_id, run, place, watched, work };
    BenchOrder { order: Some(WireOrder::Hello(hello)) }
}

pub(super) fn order(order: Order) -> BenchOrder {
    let order = match order {
        Order::Begin(Pace::Closed) => WireOrder::Begin(BenchBegin { rate_per_s: 0.0 }),
        Order::Begin(Pace::Open { rate_per_s }) => WireOrder::Begin(BenchBegin { rate_per_s }),
        Order::Go(turns) => WireOrder::Go(BenchGo { tasks: turns.tasks().to_vec(), place: turns.place() as u32 }),
        Order::Cut => WireOrder::Cut(BenchCut {}),
        Order::Stop => WireOrder::Stop(BenchStop {}),
        Order::End => WireOrder::End(BenchEnd {}),
    };
    BenchOrder { order: Some(order) }
}

/// An order; a hello comes only once, and not here.
pub(super) fn read_order(order: BenchOrder) -> Result<Order, BenchError> {
    Ok(match order.order.ok_or_else(|| wrong("an unknown order"))? {
        WireOrder::Hello(_) => return Err(wrong("a second hello")),
        WireOrder::Begin(begin) => match begin.rate_per_s {
            0.0 => Order::Begin(Pace::Closed),
            rate_per_s if rate_per_s > 0.0 && rate_per_s <= 1e9 => Order::Begin(Pace::Open { rate_per_s }),
            _ => return Err(wrong("a rate")),
        },
        WireOrder::Go(go) => {
            let possible = go.tasks.len() <= MAX_WORKERS && go.tasks.iter().all(|tasks| *tasks <= MAX_TASKS);
            let turns = possible.then(|| Turns::new(go.tasks, go.place as usize)).flatten();
            Order::Go(turns.ok_or_else(|| wrong("the tasks of all workers"))?)
        }
        WireOrder::Cut(_) => Order::Cut,
        WireOrder::Stop(_) => Order::Stop,
        WireOrder::End(_) => Order::End,
    })
}

pub(super) fn word(word: Word) -> BenchWord {
    let word = match word {
        Word::Welcome(machine) => WireWord::Welcome(BenchWelcome { machine: machine.into() }),
        Word::Prepared => WireWord::Prepared(BenchPrepared {}),
        Word::Ready(tasks) => WireWord::Ready(BenchReady { tasks }),
        Word::Part(part) => WireWord::Part(write_part(*part)),
        Word::Live(tally) => WireWord::Live(BenchLive { units: Some(write_tally(&tally)) }),
        Word::Counted => WireWord::Counted(BenchCounted {}),
        Word::Closed => WireWord::Closed(BenchClosed {}),
    };
    BenchWord { word: Some(word) }
}

pub(super) fn failed(reason: &str, message: impl std::fmt::Display) -> BenchWord {
    let failed = BenchFailed { reason: reason.into(), message: short(&message.to_string()) };
    BenchWord { word: Some(WireWord::Failed(failed)) }
}

pub(super) fn alive() -> BenchWord {
    BenchWord { word: Some(WireWord::Alive(BenchAlive {})) }
}

pub(super) fn read_word(word: BenchWord) -> Result<Heard, BenchError> {
    let word = match word.word.ok_or_else(|| wrong("an unknown word"))? {
        WireWord::Welcome(welcome) if welcome.machine.len() <= MAX_MACHINE_BYTES => {
            Word::Welcome(welcome.machine.to_vec())
        }
        WireWord::Welcome(_) => return Err(wrong("a machine")),
        WireWord::Prepared(_) => Word::Prepared,
        WireWord::Ready(ready) if ready.tasks <= MAX_TASKS => Word::Ready(ready.tasks),
        WireWord::Ready(_) => return Err(wrong("a number of tasks")),
        WireWord::Part(part) => Word::Part(Box::new(read_part(part)?)),
        WireWord::Live(live) => Word::Live(Box::new(read_tally(live.units.unwrap_or_default())?)),
        WireWord::Counted(_) => Word::Counted,
        WireWord::Closed(_) => Word::Closed,
        WireWord::Failed(failed) => {
            return Ok(Heard::Failed { reason: short(&failed.reason), message: short(&failed.message) });
        }
        WireWord::Alive(_) => return Ok(Heard::Alive),
    };
    Ok(Heard::Word(word))
}

fn write_part(part: Part) -> BenchPart {
    let Part { elapsed, units, others, own } = part;
    let other = |(name, tally): (String, Tally)| BenchMeter { name, tally: Some(write_tally(&tally)) };
    BenchPart {
        elapsed_ns: u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX),
        units: Some(write_tally(&units)),
        others: others.into_iter().map(other).collect(),
        own: Some(BenchSpent {
            user_us: own.user_us,
            system_us: own.system_us,
            rss_kib: own.rss_kib,
            anonymous_kib: own.anonymous_kib,
            voluntary_switches: own.voluntary_switches,
            involuntary_switches: own.involuntary_switches,
            write_bytes: own.write_bytes,
        }),
    }
}

fn read_part(part: BenchPart) -> Result<Part, BenchError> {
    let elapsed = Duration::from_nanos(part.elapsed_ns);
    if elapsed.is_zero() || elapsed > MAX_ELAPSED {
        return Err(wrong("how long a part took"));
    }
    if part.others.len() > MAX_METERS {
        return Err(wrong("so many meters"));
    }
    let other = |meter: BenchMeter| {
        let letters = meter.name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
        if meter.name.is_empty() || meter.name.len() > MAX_NAME_BYTES || !letters {
            return Err(wrong("a meter's name"));
        }
        Ok((meter.name, read_tally(meter.tally.unwrap_or_default())?))
    };
    let others = part.others.into_iter().map(other).collect::<Result<_, _>>()?;
    let units = read_tally(part.units.unwrap_or_default())?;
    Ok(Part { elapsed, units, others, own: read_spent(part.own.unwrap_or_default())? })
}

fn read_spent(own: BenchSpent) -> Result<Spent, BenchError> {
    let all = [
        own.user_us,
        own.system_us,
        own.rss_kib,
        own.anonymous_kib,
        own.voluntary_switches,
        own.involuntary_switches,
        own.write_bytes.unwrap_or(0),
    ];
    // What is added up must not reach the end of a u64.
    if all.iter().any(|number| *number > MOST_VALUES) {
        return Err(wrong("what a process used"));
    }
    Ok(Spent {
        user_us: own.user_us,
        system_us: own.system_us,
        rss_kib: own.rss_kib,
        anonymous_kib: own.anonymous_kib,
        voluntary_switches: own.voluntary_switches,
        involuntary_switches: own.involuntary_switches,
        write_bytes: own.write_bytes,
    })
}

fn write_tally(tally: &Tally) -> BenchTally {
    let mut before = 0;
    let (value_steps_ns, counts) =
        tally.latencies.buckets().map(|(value, count)| (value - std::mem::replace(&mut before, value), count)).unzip();
    let first_error = tally.first_error.as_deref().map(short).unwrap_or_default();
    BenchTally { errors: tally.errors, first_error, value_steps_ns, counts }
}

fn read_tally(tally: BenchTally) -> Result<Tally, BenchError> {
    let (steps, counts) = (tally.value_steps_ns, tally.counts);
    if steps.len() != counts.len() || steps.len() > MAX_BUCKETS || tally.errors > MOST_VALUES {
        return Err(wrong("a histogram's size"));
    }
    let values = steps.iter().scan(0_u64, |value, step| {
        *value = value.saturating_add(*step);
        Some(*value)
    });
    let latencies = Histogram::of_buckets(values.zip(counts)).ok_or_else(|| wrong("a histogram"))?;
    let first_error = Some(short(&tally.first_error)).filter(|text| !text.is_empty());
    Ok(Tally { count: latencies.count(), latencies, errors: tally.errors, first_error })
}

fn short(text: &str) -> String {
    text.chars().take(MAX_ERROR_CHARS).filter(|c| !c.is_control()).collect()
}

#[cfg(test)]
mod tests {
    use stentor_proto::Message;

    use super::*;

    fn tally(ms: &[u64]) -> Tally {
        let mut tally = Tally { count: ms.len() as u64, errors: 3, first_error: Some("no".into()), ..Tally::default() };
        ms.iter().for_each(|ms| tally.latencies.record(Duration::from_millis(*ms)));
        tally
    }

    fn part() -> BenchPart {
        let own = Spent { user_us: 7, write_bytes: Some(9), ..Spent::default() };
        let others = vec![("late".to_owned(), tally(&[5]))];
        write_part(Part { elapsed: Duration::from_secs(2), units: tally(&[1, 1, 80, 3_000]), others, own })
    }

    #[test]
    fn a_part_comes_as_it_was_sent() {
        let Ok(Heard::Word(Word::Part(read))) = read_word(BenchWord { word: Some(WireWord::Part(part())) }) else {
            panic!("no part");
        };
        assert_eq!((read.elapsed, read.own.user_us, read.own.write_bytes), (Duration::from_secs(2), 7, Some(9)));
        assert_eq!(read.units.latencies.summary(), tally(&[1, 1, 80, 3_000]).latencies.summary());
        assert_eq!((read.units.count, read.units.errors, read.units.first_error.as_deref()), (4, 3, Some("no")));
        assert_eq!((read.others[0].0.as_str(), read.others[0].1.count), ("late", 1));
    }

    #[test]
    fn parts_that_cannot_be_are_refused() {
        type Spoil = fn(&mut BenchPart);
        let spoils: [Spoil; 9] = [
            |p| p.elapsed_ns = 0,
            |p| p.elapsed_ns = u64::MAX,
            |p| p.others = vec![p.others[0].clone(); MAX_METERS + 1],
            |p| p.others[0].name = "<b>".into(),
            |p| p.own.as_mut().unwrap().rss_kib = u64::MAX,
            |p| p.units.as_mut().unwrap().counts[0] = u64::MAX,
            |p| p.units.as_mut().unwrap().counts.truncate(1),
            |p| p.units.as_mut().unwrap().value_steps_ns[1] = u64::MAX,
            |p| p.units.as_mut().unwrap().errors = u64::MAX,
        ];
        assert!(read_part(part()).is_ok());
        for (n, spoil) in spoils.into_iter().enumerate() {
            let mut part = part();
            spoil(&mut part);
            assert!(matches!(read_part(part), Err(BenchError::Protocol(_))), "{n}");
        }
    }

    #[test]
    fn the_fullest_part_fits_in_a_word() {
        let mut full = Tally::default();
        for exponent in 10..42 {
            (0..1_024)
                .for_each(|n| full.latencies.record(Duration::from_nanos((1 << exponent) + (n << exponent >> 10))));
        }
        full.count = full.latencies.count();
        let mut part = part();
        let tally = write_tally(&full);
        assert!(tally.counts.len() > 20_000 && tally.counts.len() < MAX_BUCKETS, "{}", tally.counts.len());
        part.others = vec![BenchMeter { name: "late".into(), tally: Some(tally.clone()) }; 3];
        part.units = Some(tally);
        assert!(BenchWord { word: Some(WireWord::Part(part)) }.encoded_len() < MAX_WORD_BYTES);
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(0_u8.., 0..400)) {
            let _ = BenchWord::decode(&bytes[..]).map(read_word);
            let _ = BenchOrder::decode(&bytes[..]).map(read_order);
        }

        #[test]
        fn no_histogram_panics(
            steps in proptest::collection::vec(0_u64.., 0..20), counts in proptest::collection::vec(0_u64.., 0..20),
        ) {
            let tally = BenchTally { value_steps_ns: steps, counts, ..BenchTally::default() };
            if let Ok(tally) = read_tally(tally) {
                let (mut twice, summary) = (tally.latencies.clone(), tally.latencies.summary());
                twice.add(&tally.latencies);
                proptest::prop_assert_eq!(twice.count(), summary.count * 2);
            }
        }
    }

    #[test]
    fn orders_come_as_they_were_sent() {
        let turns = Turns::new(vec![3, 4], 1).unwrap();
        for order in
            [Order::Begin(Pace::Open { rate_per_s: 2.5 }), Order::Go(turns), Order::Cut, Order::Stop, Order::End]
        {
            assert_eq!(format!("{:?}", read_order(super::order(order.clone())).unwrap()), format!("{order:?}"));
        }
        let begin = |rate_per_s| BenchOrder { order: Some(WireOrder::Begin(BenchBegin { rate_per_s })) };
        assert!([f64::NAN, -1.0, f64::INFINITY].iter().all(|rate| read_order(begin(*rate)).is_err()));
        let go = |tasks, place| BenchOrder { order: Some(WireOrder::Go(BenchGo { tasks, place })) };
        assert!(read_order(go(vec![1], 1)).is_err() && read_order(go(vec![1; 1_000], 0)).is_err());
        assert!(read_order(go(vec![u32::MAX], 0)).is_err() && read_order(BenchOrder { order: None }).is_err());
    }
}
