//! What the demo found, as it is printed. Must never be `ok` unless everything was sent, acknowledged, and delivered to
//! every device once, in order and unchanged.

use std::time::Duration;

use serde::Serialize;

use super::{
    parse::Skipped,
    proof::{Verdict, percentile_ms},
};
use crate::{failure::Failure, output::Output};

/// What playing a plan gave, over all conversations.
#[derive(Debug, Default)]
pub(super) struct Played {
    /// Messages and actions handed to the SDK.
    pub(super) sent: u64,
    /// Those that were acknowledged.
    pub(super) acknowledged: u64,
    /// From send to acknowledgement, in µs.
    pub(super) acknowledged_us: Vec<u32>,
    /// How often a device went away and came back.
    pub(super) absences: u64,
    /// What the devices got.
    pub(super) verdict: Verdict,
}

/// The JSON form; its first fields are promised (the public face), those at the end are extras.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    ok: bool,
    files: usize,
    conversations: usize,
    users: usize,
    devices: usize,
    sent: u64,
    skipped: SkippedCounts,
    acknowledged: u64,
    expected_deliveries: u64,
    delivered: u64,
    missing: u64,
    duplicate: u64,
    out_of_order: u64,
    altered: u64,
    p50_ms: f64,
    p99_ms: f64,
    wall_s: f64,
    delivery_p50_ms: f64,
    delivery_p99_ms: f64,
    absences: u64,
}

#[derive(Debug, Serialize)]
struct SkippedCounts {
    empty: u64,
    system: u64,
    #[serde(skip_serializing_if = "is_zero")]
    unreadable: u64,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_zero(n: &u64) -> bool {
    *n == 0
}

impl Report {
    /// Sums up.
    pub(super) fn new(
        files: usize,
        users: usize,
        devices: usize,
        skipped: Skipped,
        played: &mut Played,
        wall: Duration,
    ) -> Self {
        let verdict = &mut played.verdict;
        let round = |n: f64| (n * 1_000.0).round() / 1_000.0;
        Self {
            ok: verdict.clean() && played.sent > 0 && played.acknowledged == played.sent,
            files,
            conversations: files,
            users,
            devices,
            sent: played.sent,
            skipped: SkippedCounts { empty: skipped.empty, system: skipped.system, unreadable: skipped.unreadable },
            acknowledged: played.acknowledged,
            expected_deliveries: verdict.expected,
            delivered: verdict.delivered,
            missing: verdict.missing,
            duplicate: verdict.duplicate,
            out_of_order: verdict.out_of_order,
            altered: verdict.altered,
            p50_ms: round(percentile_ms(&mut played.acknowledged_us, 0.5)),
            p99_ms: round(percentile_ms(&mut played.acknowledged_us, 0.99)),
            wall_s: round(wall.as_secs_f64()),
            delivery_p50_ms: round(percentile_ms(&mut verdict.delivery_us, 0.5)),
            delivery_p99_ms: round(percentile_ms(&mut verdict.delivery_us, 0.99)),
            absences: played.absences,
        }
    }

    /// Prints it; fails unless everything is as it must be.
    pub(crate) fn print(&self, output: Output) -> Result<Result<(), Failure>, Failure> {
        if output.json() {
            output.value(self)?;
        } else {
            self.lines().iter().try_for_each(|line| output.text(line))?;
            let text =
                if self.ok { "proven: every device got every event once, in order, unchanged" } else { "NOT PROVEN" };
            output.text(&output.verdict(self.ok, text))?;
        }
        Ok(if self.ok { Ok(()) } else { Err(Failure::failed("the proof failed")) })
    }

    fn lines(&self) -> Vec<String> {
        let line = |name: &str, value: String| format!("{name:<22} {value}");
        let skipped = &self.skipped;
        let of = |n: u64, all: u64| format!("{n} of {all}");
        vec![
            line("conversations", self.conversations.to_string()),
            line("users, devices", format!("{}, {} ({} times away)", self.users, self.devices, self.absences)),
            line("sent", self.sent.to_string()),
            line(
                "skipped",
                format!("{} empty, {} system, {} unreadable", skipped.empty, skipped.system, skipped.unreadable),
            ),
            line("acknowledged", of(self.acknowledged, self.sent)),
            line("delivered", of(self.delivered, self.expected_deliveries)),
            line("missing, duplicate", format!("{}, {}", self.missing, self.duplicate)),
            line("out of order, altered", format!("{}, {}", self.out_of_order, self.altered)),
            line("to acknowledgement", format!("p50 {} ms, p99 {} ms", self.p50_ms, self.p99_ms)),
            line("to every device", format!("p50 {} ms, p99 {} ms", self.delivery_p50_ms, self.delivery_p99_ms)),
            line("wall", format!("{} s", self.wall_s)),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(change: impl FnOnce(&mut Played)) -> Report {
        let verdict = Verdict { expected: 4, delivered: 4, ..Verdict::default() };
        let mut played = Played { sent: 2, acknowledged: 2, verdict, ..Played::default() };
        change(&mut played);
        Report::new(1, 2, 3, Skipped::default(), &mut played, Duration::from_millis(1_500))
    }

    #[test]
    fn only_a_whole_success_is_ok() {
        assert!(report(|_| {}).ok);
        assert!(!report(|p| p.acknowledged = 1).ok);
        assert!(!report(|p| p.verdict.delivered = 3).ok);
        assert!(!report(|p| p.verdict.altered = 1).ok);
        assert!(!report(|p| (p.sent, p.acknowledged) = (0, 0)).ok);
    }

    #[test]
    fn the_json_has_the_promised_fields() {
        let json = serde_json::to_value(report(|_| {})).unwrap();
        let promised = [
            "ok",
            "files",
            "conversations",
            "users",
            "devices",
            "sent",
            "skipped",
            "acknowledged",
            "expected_deliveries",
            "delivered",
            "missing",
            "duplicate",
            "out_of_order",
            "altered",
            "p50_ms",
            "p99_ms",
            "wall_s",
        ];
        for field in promised {
            assert!(json.get(field).is_some(), "{field}");
        }
        assert_eq!(json["skipped"], serde_json::json!({ "empty": 0, "system": 0 }));
    }
}
