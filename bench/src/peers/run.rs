//! Runs works on both sides in turn, A B A B, so that a disk that is slow for a while is slow for both. Must never put
//! a figure of one run beside one of another run.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use super::{
    Load, Peer, PeerError,
    ejabberd::Ejabberd,
    floors::{Bare, Raw},
    mosquitto::Mosquitto,
    nats::{Durability, Nats},
    ours::{Door, Ours},
    parked::OneCore,
    rabbit::Rabbit,
    redis::Redis,
    table::{self, Table},
    works::{self, Against, Goal, Side, Work},
};
use crate::{BenchError, Outcome, Timing};

/// What to run.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Our binary; the floors' programs lie in `examples/` beside it.
    pub binary: PathBuf,
    /// How long, and how many repeats of both sides in turn.
    pub timing: Timing,
    /// Only these works; all when empty.
    pub only: Vec<String>,
    /// Only the peers that a promise names.
    pub promised: bool,
}

/// Ours and theirs of each repeat, or why there are none.
type Pairs = Result<Vec<(Outcome, Outcome)>, String>;

/// Runs them; `progress` is told what happens. An error only for a work that does not exist: all else is in the table.
pub async fn run(settings: &Settings, progress: &(dyn Fn(&str) + Send + Sync)) -> Result<Table, BenchError> {
    let works = chosen(settings)?;
    let mut rows = Vec::new();
    let mut pool = Pool { binary: settings.binary.clone(), ..Pool::default() };
    for work in &works {
        let pairs = pool.measure(work, settings.timing, progress).await;
        for (side, pairs) in work.sides.iter().zip(&pairs) {
            rows.extend(table::rows(work, side, pairs));
        }
    }
    Ok(Table { rows })
}

fn chosen(settings: &Settings) -> Result<Vec<Work>, BenchError> {
    let mut works = works::all();
    let known = |name: &str| works.iter().any(|work| work.name == name);
    if let Some(unknown) = settings.only.iter().find(|name| !known(name)) {
        return Err(BenchError::Settings(format!("there is no work {unknown} (see --list)")));
    }
    if !settings.only.is_empty() {
        works.retain(|work| settings.only.iter().any(|name| name == work.name));
    }
    if settings.promised {
        let promised = |side: &Side| side.rows.iter().any(|(_, goal)| *goal != Goal::None);
        works.iter_mut().for_each(|work| work.sides.retain(promised));
    }
    Ok(works)
}

/// Servers that run, kept from one work to the next while it needs them.
#[derive(Default)]
struct Pool {
    binary: PathBuf,
    ours: Option<(u32, Door, Ours)>,
    peers: BTreeMap<&'static str, Result<Box<dyn Peer>, String>>,
}

impl Pool {
    /// The pairs of each side.
    async fn measure(&mut self, work: &Work, timing: Timing, progress: &(dyn Fn(&str) + Send + Sync)) -> Vec<Pairs> {
        progress(&format!("{}: starting the servers", work.name));
        self.start(work).await;
        let mut pairs: Vec<Pairs> = work
            .sides
            .iter()
            .map(|side| match self.peers.get(servers(side.against).name()) {
                Some(Err(why)) => Err(why.clone()),
                _ => Ok(Vec::new()),
            })
            .collect();
        for repeat in 1..=timing.repeats {
            if pairs.iter().all(Result::is_err) {
                break;
            }
            // A process that had connections before has their memory still, and ejabberd goes on for long to clear away
            // what those who have left had in its archive.
            let idle = matches!(work.load, Load::Idle { .. });
            if idle {
                self.ours = None;
            }
            if repeat > 1 && (idle || matches!(work.load, Load::Chat { .. })) {
                self.peers.retain(|_, peer| peer.is_err());
                self.start(work).await;
            }
            progress(&format!("{}: repeat {repeat} of {}, ours", work.name, timing.repeats));
            let ours = match self.ours(work, timing).await {
                Ok(ours) => ours,
                Err(error) => {
                    let failed = format!("not measured: ours failed: {}", why(&error));
                    pairs.iter_mut().filter(|pairs| pairs.is_ok()).for_each(|pairs| *pairs = Err(failed.clone()));
                    // A cluster that failed once is not asked again.
                    self.ours = None;
                    break;
                }
            };
            for (side, pairs) in work.sides.iter().zip(&mut pairs) {
                let Ok(measured) = pairs else { continue };
                progress(&format!("{}: repeat {repeat} of {}, {}", work.name, timing.repeats, side.against.name()));
                match self.theirs(side, timing).await {
                    Ok(theirs) => measured.push((ours.clone(), theirs)),
                    Err(why) => *pairs = Err(why),
                }
            }
        }
        pairs
    }

    /// Starts what a work needs and ends what it does not.
    async fn start(&mut self, work: &Work) {
        let needed: Vec<_> = work.sides.iter().map(|side| servers(side.against)).collect();
        self.peers.retain(|name, _| needed.iter().any(|needed| needed.name() == *name));
        for against in needed {
            if !self.peers.contains_key(against.name()) {
                let started = start(against, &self.binary).await.map_err(|error| why(&error));
                self.peers.insert(against.name(), started);
            }
        }
    }

    async fn ours(&mut self, work: &Work, timing: Timing) -> Result<Outcome, PeerError> {
        let key = (work.shards, work.door);
        if self.ours.as_ref().is_none_or(|(shards, door, _)| (*shards, *door) != key) {
            // The old one ends before the new one begins.
            self.ours = None;
            self.ours = Some((key.0, key.1, Ours::start(&self.binary, key.0, key.1).await?));
        }
        match &mut self.ours {
            Some((_, _, ours)) => ours.run(&work.load, timing).await,
            None => Err(PeerError::failed("start our cluster", "it is not there")),
        }
    }

    async fn theirs(&mut self, side: &Side, timing: Timing) -> Result<Outcome, String> {
        let name = servers(side.against).name();
        let outcome = match self.peers.get_mut(name) {
            Some(Ok(peer)) => peer.run(&side.load, timing).await.map_err(|error| why(&error)),
            Some(Err(why)) => return Err(why.clone()),
            None => return Err(format!("not measured: {name} was not started")),
        };
        if let Err(why) = &outcome {
            // Whatever state it is in now is not the one that it should be measured in.
            self.peers.insert(name, Err(why.clone()));
        }
        outcome
    }
}

fn why(error: &PeerError) -> String {
    match error {
        PeerError::Missing(what) => format!("missing: {what}"),
        other => format!("not measured: {other}"),
    }
}

/// Who starts the servers: NATS is the same with and without a log.
fn servers(against: Against) -> Against {
    if against == Against::NatsCore { Against::NatsAlways } else { against }
}

async fn start(against: Against, binary: &Path) -> Result<Box<dyn Peer>, PeerError> {
    Ok(match against {
        Against::NatsAlways | Against::NatsCore => Box::new(Nats::start(Durability::Always).await?),
        Against::NatsDefault => Box::new(Nats::start(Durability::Default).await?),
        Against::Rabbit => Box::new(Rabbit::start().await?),
        Against::Redis => Box::new(Redis::start().await?),
        Against::Mosquitto => Box::new(Mosquitto::start().await?),
        Against::EjabberdArchive => Box::new(Ejabberd::start(true).await?),
        Against::Ejabberd => Box::new(Ejabberd::start(false).await?),
        Against::BareQuic => Box::new(Bare::start(binary).await?),
        Against::RawRocks => Box::new(Raw::start(binary)?),
        Against::OursSmall => Box::new(Ours::start(binary, works::SHARDS, Door::Sessions).await?),
        Against::OneCore => Box::new(OneCore),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(only: &[&str], promised: bool) -> Settings {
        let timing = Timing { warm_up_s: 0.0, seconds: 0.1, repeats: 3 };
        let only = only.iter().map(|name| (*name).to_owned()).collect();
        Settings { binary: "/nowhere/stentor".into(), timing, only, promised }
    }

    #[test]
    fn works_are_chosen_by_name_and_unknown_ones_are_refused() {
        let works = chosen(&settings(&["one-64", "parked"], false)).unwrap();
        assert_eq!((works.len(), works[0].name, works[0].sides.len()), (2, "one-64", 3));
        let works = chosen(&settings(&["one-64"], true)).unwrap();
        assert_eq!(works[0].sides.len(), 2, "nothing is promised against Redis");
        assert!(matches!(chosen(&settings(&["one"], false)), Err(BenchError::Settings(_))));
    }

    #[tokio::test]
    async fn what_is_not_there_is_in_the_table_all_the_same() {
        let told = std::sync::Mutex::new(Vec::new());
        let progress = |what: &str| told.lock().unwrap().push(what.to_owned());
        let table = run(&settings(&["handshake"], true), &progress).await.unwrap();
        let notes: Vec<_> = table.rows.iter().map(|row| row.note.clone().unwrap()).collect();
        assert_eq!(table.lacking(), 2);
        assert!(notes[0].starts_with("missing: bare_quic is not built"), "{notes:?}");
        assert!(told.lock().unwrap()[0].starts_with("handshake: "));
    }

    #[tokio::test]
    async fn a_cluster_of_ours_that_does_not_start_is_told() {
        let work = Work { sides: vec![], ..works::all().remove(0) };
        let mut pool = Pool { binary: "/nowhere/stentor".into(), ..Pool::default() };
        let error = pool.ours(&work, settings(&[], false).timing).await.unwrap_err();
        assert!(why(&error).contains("/nowhere/stentor"), "{error}");
    }
}
