//! Memberships under lost directories, crashes at every step and changes of the placement. Must prove that no step gives
//! a vote to a replica that lacks the log, and that every way ends.

use proptest::prelude::*;
use stentor_proto::ids::{BrokerId, Incarnation};

use super::*;

fn id(broker: u32, incarnation: u32) -> ReplicaId {
    ReplicaId { broker: BrokerId(broker), incarnation: Incarnation(incarnation) }
}

fn set(ids: &[ReplicaId]) -> BTreeSet<ReplicaId> {
    ids.iter().copied().collect()
}

fn members(voters: &[ReplicaId], learners: &[ReplicaId]) -> Members {
    Members { voters: vec![set(voters)], learners: set(learners) }
}

const OLD: [(u32, u32); 3] = [(1, 1), (2, 1), (3, 1)];

fn old() -> Vec<ReplicaId> {
    OLD.iter().map(|&(b, i)| id(b, i)).collect()
}

#[test]
fn a_lost_directory_is_replaced_step_by_step() {
    let placed = [id(1, 1), id(2, 1), id(3, 2)];
    let nobody = |_| false;
    assert_eq!(next_step(&members(&old(), &[]), &old(), nobody), Step::Settled);
    assert_eq!(next_step(&members(&old(), &[]), &placed, nobody), Step::AddLearner(id(3, 2)));
    let waiting = members(&old(), &[id(3, 2)]);
    assert_eq!(next_step(&waiting, &placed, nobody), Step::Wait);
    assert_eq!(next_step(&waiting, &placed, |l| l == id(3, 2)), Step::ChangeVoters(set(&placed)));
    let joint = Members { voters: vec![set(&old()), set(&placed)], learners: set(&[]) };
    assert_eq!(next_step(&joint, &placed, nobody), Step::ChangeVoters(set(&placed)), "whoever leads finishes it");
    assert_eq!(next_step(&members(&placed, &[]), &placed, nobody), Step::Settled);
}

#[test]
fn a_joiner_that_was_lost_again_makes_room_for_the_next() {
    let placed = [id(1, 1), id(2, 1), id(3, 3)];
    let half = members(&old(), &[id(3, 2)]);
    assert_eq!(next_step(&half, &placed, |_| true), Step::RemoveLearner(id(3, 2)), "also when it has caught up");
    assert_eq!(next_step(&members(&old(), &[]), &placed, |_| true), Step::AddLearner(id(3, 3)));
}

#[test]
fn nobody_goes_back_to_a_directory_that_was_replaced() {
    let now = [id(1, 1), id(2, 1), id(3, 2)];
    for ready in [true, false] {
        assert_eq!(next_step(&members(&now, &[]), &old(), |_| ready), Step::Wait, "an old placement");
        assert_eq!(next_step(&members(&old(), &[id(3, 2)]), &old(), |_| ready), Step::Wait);
    }
}

#[test]
fn a_directory_is_replaced_when_the_members_lack_it_and_not_when_the_placement_does() {
    let (lost, new) = (id(3, 1), id(3, 2));
    assert!(!is_replaced(lost, old()));
    assert!(!is_replaced(lost, old().into_iter().chain([new])), "its successor is a learner, or half-way to its vote");
    assert!(is_replaced(lost, [id(1, 1), id(2, 1), new]));
    assert!(!is_replaced(new, old()), "it was never there");
    assert!(!is_replaced(lost, [id(1, 2), id(2, 2), id(4, 2)]), "moved away, or not known here yet");
    assert!(!is_replaced(lost, []));
}

#[test]
fn a_replica_moves_to_another_broker() {
    let placed = [id(1, 1), id(2, 1), id(4, 1)];
    let ready = members(&old(), &[id(4, 1)]);
    assert_eq!(next_step(&ready, &placed, |_| true), Step::ChangeVoters(set(&placed)));
    // Two lost at once: each takes the place of its own predecessor, never of the other's.
    let both = [id(1, 1), id(2, 2), id(3, 2)];
    let ready = members(&old(), &[id(2, 2), id(3, 2)]);
    let first = next_step(&ready, &both, |l| l == id(3, 2));
    assert_eq!(first, Step::ChangeVoters(set(&[id(1, 1), id(2, 1), id(3, 2)])));
}

#[test]
fn a_learner_votes_only_with_nearly_all_of_the_log() {
    let lag = limits::PROMOTE_LAG_ENTRIES;
    assert!(caught_up(Some(1_000), 1_000) && caught_up(Some(1_000 - lag), 1_000) && caught_up(Some(1_001), 1_000));
    assert!(!caught_up(Some(999 - lag), 1_000) && !caught_up(None, 0));
}

/// A group whose steps are cut off anywhere.
#[derive(Debug)]
struct Group {
    members: Members,
    placed: Vec<ReplicaId>,
    caught_up: BTreeSet<ReplicaId>,
}

#[derive(Debug, Clone)]
enum Event {
    /// The leader takes its next step; a change of voters may stop half-way.
    Step { cut: bool },
    /// A learner catches up.
    CatchUp,
    /// A broker loses its directory, and an empty one takes its place.
    Lose(u32),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => any::<bool>().prop_map(|cut| Event::Step { cut }),
        3 => Just(Event::CatchUp),
        1 => (1..=3u32).prop_map(Event::Lose),
    ]
}

impl Group {
    fn next(&self) -> Step {
        next_step(&self.members, &self.placed, |id| self.caught_up.contains(&id))
    }

    fn take(&mut self, cut: bool) -> Step {
        let step = self.next();
        match &step {
            Step::Settled | Step::Wait => {}
            Step::AddLearner(id) => assert!(self.members.learners.insert(*id)),
            Step::RemoveLearner(id) => assert!(self.members.learners.remove(id)),
            Step::ChangeVoters(goal) => self.change(goal, cut),
        }
        step
    }

    fn change(&mut self, goal: &BTreeSet<ReplicaId>, cut: bool) {
        if let [voters] = &self.members.voters[..] {
            let (came, left) = (goal - voters, voters - goal);
            assert!(came.len() <= 1 && left.len() <= 1 && !goal.is_empty(), "one at a time: {voters:?} {goal:?}");
            assert!(came.iter().all(|id| self.members.learners.contains(id) && self.caught_up.contains(id)));
            assert!(came.len() == left.len() || voters.len() != 3, "three voters stay three");
        }
        self.members.learners.retain(|id| !goal.contains(id));
        if cut && self.members.voters.len() == 1 {
            self.members.voters.push(goal.clone());
        } else {
            self.members.voters = vec![goal.clone()];
        }
    }

    fn happen(&mut self, event: &Event) {
        match event {
            Event::Step { cut } => drop(self.take(*cut)),
            Event::CatchUp => self.caught_up.extend(self.members.learners.first()),
            Event::Lose(broker) => {
                let lost = self.placed.iter_mut().find(|id| id.broker.0 == *broker).unwrap();
                lost.incarnation.0 += 1;
            }
        }
    }
}

proptest! {
    #[test]
    fn every_way_ends_with_the_placement(events in prop::collection::vec(event(), 0..60)) {
        let mut group = Group { members: members(&old(), &[]), placed: old(), caught_up: BTreeSet::new() };
        for event in &events {
            group.happen(event);
            for voters in &group.members.voters {
                let brokers: BTreeSet<_> = voters.iter().map(|id| id.broker).collect();
                prop_assert_eq!((brokers.len(), voters.len()), (3, 3), "{:?} after {:?}", &group, event);
            }
        }
        let mut steps = 0;
        while group.take(false) != Step::Settled {
            group.happen(&Event::CatchUp);
            steps += 1;
            prop_assert!(steps < 20, "{:?}", group);
        }
        prop_assert_eq!(&group.members, &members(&group.placed, &[]));
    }
}
