//! A report for people, or as one JSON line. Must never round a figure to something that it is not: what is not known
//! is a dash.

use stentor_bench::{
    Outcome, Report,
    report::{Change, Phase, Verdict},
};

use crate::{failure::Failure, output::Output};

/// Prints a whole report.
pub(super) fn report(report: &Report, output: Output) -> Result<(), Failure> {
    if output.json() {
        return output.value(report);
    }
    let mut rows = vec![
        ["", "rate/s", "p50 ms", "p99 ms", "p99.9 ms", "max ms", "server µs", "bench µs", "flushes", "bytes", "errors"]
            .map(str::to_owned)
            .to_vec(),
    ];
    for phase in &report.phases {
        rows.push(row(&phase.name, &phase.median));
        if phase.runs.len() > 1 {
            rows.extend(phase.runs.iter().enumerate().map(|(n, run)| row(&format!("  repeat {}", n + 1), run)));
        }
    }
    output.table(&rows)?;
    if !report.workers.is_empty() {
        output.text("")?;
        let mut workers = vec![["worker", "at", "CPUs", "load before"].map(str::to_owned).to_vec()];
        workers.extend(report.workers.iter().map(|worker| {
            let machine = &worker.machine;
            let (cpus, load) = (machine.cpus.to_string(), number(machine.load_before));
            vec![worker.process.clone(), worker.address.clone(), cpus, load]
        }));
        output.table(&workers)?;
    }
    for phase in &report.phases {
        if report.phases.len() == 1 || phase.runs.len() > 1 {
            details(phase, output)?;
        }
    }
    Ok(())
}

/// Prints a comparison; a failure when something got worse.
pub(super) fn changes(before: &Report, after: &Report, changes: &[Change], output: Output) -> Result<(), Failure> {
    if before.machine.cpu != after.machine.cpu || before.machine.cpus != after.machine.cpus {
        output.notice("the reports are of different machines");
    }
    let worse = changes.iter().filter(|change| change.verdict == Verdict::Worse).count();
    if output.json() {
        output.value(&serde_json::json!({ "worse": worse, "changes": changes }))?;
    } else {
        let mut rows =
            vec![["phase", "figure", "before", "after", "ratio", "99 % interval", ""].map(str::to_owned).to_vec()];
        rows.extend(changes.iter().map(|change| changed(change, output)));
        output.table(&rows)?;
    }
    match worse {
        0 => Ok(()),
        1 => Err(Failure::failed("one figure got worse")),
        n => Err(Failure::failed(format_args!("{n} figures got worse"))),
    }
}

fn changed(change: &Change, output: Output) -> Vec<String> {
    let interval = change.interval.map_or_else(|| "-".to_owned(), |(low, high)| format!("{low:.2} to {high:.2}"));
    let verdict = match change.verdict {
        Verdict::Same => "same".to_owned(),
        Verdict::Better => output.verdict(true, "better"),
        Verdict::Worse => output.verdict(false, "worse"),
        Verdict::Unknown => "unknown: fewer than 3 repeats".to_owned(),
    };
    vec![
        change.phase.clone(),
        change.figure.clone(),
        number(change.before),
        number(change.after),
        format!("{:.3}", change.ratio),
        interval,
        verdict,
    ]
}

fn row(name: &str, outcome: &Outcome) -> Vec<String> {
    let cell = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), number);
    let latency = &outcome.latency;
    vec![
        name.to_owned(),
        number(outcome.rate_per_s),
        number(latency.p50_ms),
        number(latency.p99_ms),
        number(latency.p999_ms),
        number(latency.max_ms),
        cell(outcome.server_cpu_us),
        cell(outcome.client_cpu_us),
        cell(outcome.flushes_per_message),
        cell(outcome.bytes_written_per_message),
        outcome.errors.to_string(),
    ]
}

/// Each process, and what else was measured.
fn details(phase: &Phase, output: Output) -> Result<(), Failure> {
    let median = &phase.median;
    let per_s = |count: u64| number(count as f64 / median.seconds.max(1e-9));
    output.text("")?;
    let mut rows =
        vec![["process", "CPU µs", "CPU %", "RSS MiB", "waits/s", "preempted/s"].map(str::to_owned).to_vec()];
    rows.extend(median.processes.iter().map(|(name, spent)| {
        let each = median.per_unit(spent.cpu_us() as f64).map_or_else(|| "-".to_owned(), number);
        let share = number(spent.cpu_us() as f64 / 1e4 / median.seconds.max(1e-9));
        let memory = number(spent.rss_kib as f64 / 1024.0);
        vec![name.clone(), each, share, memory, per_s(spent.voluntary_switches), per_s(spent.involuntary_switches)]
    }));
    output.table(&rows)?;
    for (name, value) in &median.figures {
        output.text(&format!("{name} {}", number(*value)))?;
    }
    if let Some(error) = &median.first_error {
        output.text(&format!("the first error: {error}"))?;
    }
    Ok(())
}

/// Three digits that count, without exponent.
fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 1.0 => format!("{value:.2}"),
        v if v >= 0.01 => format!("{value:.3}"),
        _ => format!("{value:.5}"),
    }
}
