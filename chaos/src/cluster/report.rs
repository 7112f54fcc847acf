//! What came out of a run, for people and for programs. Must never call a run good that was not judged, or that the
//! faults did not meet.

use std::fmt;

use serde::Serialize;

use crate::oracle::Verdict;

/// One blow.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Fault {
    /// Which nodes were killed.
    pub nodes: Vec<String>,
    /// Lines that the sender had and that had no answer then; with a ceiling on the rate, some wait for their turn.
    pub unanswered: u64,
    /// Lines with an answer by then.
    pub answered: u64,
}

/// One run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Which scenario.
    pub scenario: &'static str,
    /// All promises were kept, all that should have come came, and the faults were as many as were asked for.
    pub ok: bool,
    /// The seed of all that was left to chance.
    pub seed: u64,
    /// How long it took.
    pub wall_s: f64,
    /// What was broken, in order.
    pub faults: Vec<Fault>,
    /// The longest time between two answers, in ms; of a sender of lines only.
    pub longest_stall_ms: Option<u64>,
    /// What the oracle says.
    pub verdict: Verdict,
    /// What did not come, or was not as it should be, as sentences.
    pub missing: Vec<String>,
    /// What `admin verify` said, when all was over.
    pub verify: serde_json::Value,
    /// Where data and logs are, if something was wrong.
    pub kept: Option<String>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (verdict, judged) = (&self.verdict, self.verdict.judged);
        writeln!(f, "{}: {}", self.scenario, if self.ok { "ok" } else { "FAILED" })?;
        let mut row = |what: &str, value: String| writeln!(f, "  {what:<16} {value}");
        row("seed", format!("{:x}", self.seed))?;
        row("took", format!("{:.1} s", self.wall_s))?;
        row("faults", format!("{}", self.faults.len()))?;
        if self.scenario == "all" {
            let open = self.faults.iter().map(|fault| fault.unanswered);
            let (least, most) = (open.clone().min().unwrap_or(0), open.max().unwrap_or(0));
            row("unanswered", format!("{least} to {most} sends at each fault"))?;
        }
        if let Some(stall) = self.longest_stall_ms {
            row("longest stall", format!("{:.1} s", stall as f64 / 1_000.0))?;
        }
        row(
            "operations",
            format!(
                "{}: {} acknowledged, {} refused, {} unknown",
                judged.operations, judged.acknowledged, judged.refused, judged.unknown
            ),
        )?;
        row("events", format!("{} in the end", judged.events))?;
        row(
            "streams",
            format!("{} with {} deliveries; {} cursors", judged.streams, judged.deliveries, judged.cursors),
        )?;
        let clean = self.verify["ok"] == true;
        row("verify", if clean { "clean".into() } else { self.verify.to_string() })?;
        match verdict.is_clean() {
            true => row("broken promises", "none".into())?,
            false => row("broken promises", format!("{}", verdict.violations.len() as u64 + verdict.more_violations))?,
        }
        for violation in &verdict.violations {
            writeln!(f, "    {} in {}: {}", violation.invariant, violation.conversation, violation.what)?;
        }
        for missing in &self.missing {
            writeln!(f, "    missing: {missing}")?;
        }
        if let Some(kept) = &self.kept {
            writeln!(f, "    data and logs are kept in {kept}")?;
        }
        Ok(())
    }
}
