//! What an empty data directory does: founds a cluster with the others, joins the one that exists, or waits until it can
//! tell which. Must never found a cluster where there may be one: that would vote away what it has acknowledged.

use stentor_proto::ids::{BrokerId, Incarnation};

/// How far a broker is, as it says itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// It cannot tell yet.
    Unknown,
    /// Its directory is empty.
    New,
    /// Its directory belongs to a cluster whose meta shard has no history there.
    Founding,
    /// Its meta shard has history: the cluster exists.
    Member,
}

/// What another broker says when it is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Its cluster; empty while it has none.
    pub cluster_id: String,
    /// How far it is.
    pub stage: Stage,
    /// The last incarnation given to a directory of the asking broker, as far as this one knows; 0: it does not know.
    pub given: Incarnation,
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Way {
    /// Ask again.
    Wait(Waiting),
    /// Nobody has any history: take part in founding the cluster.
    Found,
    /// Ask this cluster for the incarnation after `last`.
    Join {
        /// The cluster that exists.
        cluster_id: String,
        /// The last incarnation that it gave to this broker.
        last: Incarnation,
    },
    /// This broker answers for another cluster: the configuration is at fault.
    OtherCluster(BrokerId, String),
}

/// What is missing, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Waiting {
    /// This one has not answered, and only it may know of a cluster.
    Silent(BrokerId),
    /// The cluster exists, and nobody who answers knows its brokers yet: too few of them are there.
    NoMeta,
    /// Nobody has a cluster, and this one's configuration founds none.
    NoCluster,
}

/// Decides from what each of the other configured brokers answered (`None`: nothing). `founds` is the cluster that the
/// own configuration would found.
pub fn choose(founds: Option<&str>, answers: &[(BrokerId, Option<Answer>)]) -> Way {
    let told = || answers.iter().filter_map(|(broker, answer)| Some((*broker, answer.as_ref()?)));
    let known = founds.or_else(|| told().map(|(_, a)| a.cluster_id.as_str()).find(|id| !id.is_empty()));
    if let Some((broker, other)) = told().find(|(_, a)| !a.cluster_id.is_empty() && Some(&*a.cluster_id) != known) {
        return Way::OtherCluster(broker, other.cluster_id.clone());
    }
    let members = || told().filter(|(_, a)| a.stage == Stage::Member);
    if let Some((_, member)) = members().next() {
        return match members().map(|(_, a)| a.given).max().filter(|last| last.0 > 0) {
            Some(last) => Way::Join { cluster_id: member.cluster_id.clone(), last },
            None => Way::Wait(Waiting::NoMeta),
        };
    }
    let unsure = |answer: &Option<Answer>| answer.as_ref().is_none_or(|a| a.stage == Stage::Unknown);
    if let Some((broker, _)) = answers.iter().find(|(_, answer)| unsure(answer)) {
        return Way::Wait(Waiting::Silent(*broker));
    }
    match founds {
        Some(_) => Way::Found,
        None => Way::Wait(Waiting::NoCluster),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: Option<&str> = Some("c1");

    fn answer(stage: Stage, given: u32) -> Option<Answer> {
        let cluster_id = if stage == Stage::New { "" } else { "c1" }.to_owned();
        Some(Answer { cluster_id, stage, given: Incarnation(given) })
    }

    fn way(founds: Option<&str>, answers: [Option<Answer>; 2]) -> Way {
        let [a, b] = answers;
        choose(founds, &[(BrokerId(1), a), (BrokerId(2), b)])
    }

    #[test]
    fn a_cluster_is_founded_only_when_nobody_can_have_one() {
        use Stage::*;
        assert_eq!(way(OWN, [answer(New, 0), answer(New, 0)]), Way::Found);
        assert_eq!(way(OWN, [answer(Founding, 0), answer(New, 0)]), Way::Found);
        for unsure in [None, answer(Unknown, 0)] {
            let silent = Way::Wait(Waiting::Silent(BrokerId(2)));
            assert_eq!(way(OWN, [answer(New, 0), unsure.clone()]), silent);
            assert_eq!(way(OWN, [answer(Founding, 0), unsure]), silent);
        }
        assert_eq!(way(None, [answer(New, 0), answer(New, 0)]), Way::Wait(Waiting::NoCluster));
    }

    #[test]
    fn one_broker_with_history_is_enough_to_join_and_the_newest_number_counts() {
        use Stage::*;
        let join = |last| Way::Join { cluster_id: "c1".into(), last: Incarnation(last) };
        for founds in [OWN, None] {
            assert_eq!(way(founds, [answer(Member, 1), None]), join(1));
            assert_eq!(way(founds, [answer(Member, 1), answer(Member, 2)]), join(2));
            assert_eq!(way(founds, [answer(New, 0), answer(Member, 3)]), join(3));
            assert_eq!(way(founds, [answer(Member, 0), answer(Founding, 9)]), Way::Wait(Waiting::NoMeta));
        }
    }

    #[test]
    fn another_cluster_is_never_joined() {
        use Stage::*;
        assert_eq!(way(Some("c2"), [answer(Member, 1), None]), Way::OtherCluster(BrokerId(1), "c1".into()));
        let mut foreign = answer(Member, 1);
        foreign.as_mut().unwrap().cluster_id = "c3".into();
        let mixed = way(None, [answer(Member, 1), foreign]);
        assert_eq!(mixed, Way::OtherCluster(BrokerId(2), "c3".into()));
        assert_eq!(way(Some("c2"), [answer(New, 0), answer(New, 0)]), Way::Found);
    }
}
