//! A report as one page: tables and plots as inline SVG. Must never load anything from elsewhere, nor show text that is
//! not escaped: names of errors come from other machines.

use std::fmt::Write;

use super::{Phase, Report};
use crate::Outcome;

const STYLE: &str = "body{font:15px/1.45 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;\
color:#1d1d1f;background:#fff}h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2.2rem}\
table{border-collapse:collapse;font-variant-numeric:tabular-nums}td,th{padding:.2rem .7rem;text-align:right;\
border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}.note{color:#666}\
svg{display:block;margin:1rem 0;max-width:100%;height:auto}svg text{font:12px system-ui,sans-serif;fill:#444}\
@media(prefers-color-scheme:dark){body{color:#eee;background:#1b1b1d}td,th{border-color:#444}.note{color:#aaa}\
svg text{fill:#bbb}}";
/// Distinguishable also for those who do not see colours as others do.
const COLOURS: [&str; 7] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999"];
const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 300.0;
const LEFT: f64 = 76.0;
const RIGHT: f64 = 36.0;
const BOTTOM: f64 = 40.0;
const TOP: f64 = 12.0;

/// The whole page.
pub fn page(report: &Report) -> String {
    let mut page = String::new();
    let title = format!("stentor bench {}", report.scenario);
    let _ = write!(
        page,
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>\
         <title>{0}</title><style>{STYLE}</style><h1>{0}</h1><p class=note>{1}</p>",
        escape(&title),
        escape(&about(report))
    );
    let _ = write!(page, "<p class=note>Settings: <code>{}</code></p>", escape(&report.settings.to_string()));
    workers(&mut page, report);
    table(&mut page, report);
    if report.phases.iter().any(|phase| !phase.median.curve.is_empty()) {
        page.push_str("<h2>Latency</h2><p class=note>At most so many ms for this share of all units.</p>");
        curves(&mut page, &report.phases);
    }
    for phase in &report.phases {
        section(&mut page, phase);
    }
    page.push_str("</html>\n");
    page
}

fn about(report: &Report) -> String {
    let (machine, cluster, timing) = (&report.machine, &report.cluster, report.timing);
    let shards = cluster.shards.map_or_else(String::new, |shards| format!(", {shards} shards"));
    format!(
        "{}, version {}. {} brokers, {} gateways{shards}. {} CPUs ({}), {} MiB, Linux {}, {}. \
         {} repeats of {} s after {} s of warm-up; load before {}.",
        report.began,
        report.version,
        cluster.brokers,
        cluster.gateways,
        machine.cpus,
        machine.cpu,
        machine.memory_mib,
        machine.kernel,
        machine.file_system,
        timing.repeats,
        timing.seconds,
        timing.warm_up_s,
        machine.load_before
    )
}

fn table(page: &mut String, report: &Report) {
    page.push_str(
        "<table><tr><th>medians<th>per s<th>p50 ms<th>p99 ms<th>p99.9 ms<th>server CPU µs<th>bench CPU µs\
         <th>flushes<th>bytes written<th>errors",
    );
    for phase in &report.phases {
        let o = &phase.median;
        let _ = write!(page, "<tr><td>{}", escape(&phase.name));
        let l = &o.latency;
        for value in [Some(o.rate_per_s), Some(l.p50_ms), Some(l.p99_ms), Some(l.p999_ms)] {
            cell(page, value);
        }
        for value in [o.server_cpu_us, o.client_cpu_us, o.flushes_per_message, o.bytes_written_per_message] {
            cell(page, value);
        }
        let _ = write!(page, "<td>{}", o.errors);
    }
    page.push_str("</table>");
}

fn workers(page: &mut String, report: &Report) {
    if report.workers.is_empty() {
        return;
    }
    let _ = write!(page, "<p class=note>The load was made by {} workers together.</p>", report.workers.len());
    page.push_str("<table><tr><th>worker<th>at<th>CPUs<th>CPU<th>load before");
    for worker in &report.workers {
        let machine = &worker.machine;
        let _ = write!(
            page,
            "<tr><td>{}<td>{}<td>{}<td>{}<td>{}",
            escape(&worker.process),
            escape(&worker.address),
            machine.cpus,
            escape(&machine.cpu),
            short(machine.load_before)
        );
    }
    page.push_str("</table>");
}

fn cell(page: &mut String, value: Option<f64>) {
    let _ = write!(page, "<td>{}", value.map_or_else(|| "–".into(), short));
}

fn section(page: &mut String, phase: &Phase) {
    let _ = write!(page, "<h2>{}</h2>", escape(&phase.name));
    if phase.runs.len() > 1 {
        page.push_str("<p class=note>Units per second, repeat by repeat; the line is the median.</p>");
        repeats(page, &phase.runs, phase.median.rate_per_s);
    }
    processes(page, &phase.median);
    if !phase.median.figures.is_empty() {
        page.push_str("<table><tr><th>figure<th>median");
        for (name, value) in &phase.median.figures {
            let _ = write!(page, "<tr><td>{}<td>{}", escape(name), short(*value));
        }
        page.push_str("</table>");
    }
    if let Some(error) = &phase.median.first_error {
        let _ = write!(page, "<p>The first error: {}</p>", escape(error));
    }
}

fn processes(page: &mut String, outcome: &Outcome) {
    if outcome.processes.is_empty() {
        return;
    }
    let widest = outcome.processes.values().map(|spent| spent.cpu_us()).max().unwrap_or(1).max(1) as f64;
    page.push_str("<table><tr><th>process<th>CPU µs per unit<th>CPU %<th>RSS MiB<th>waits/s<th>preempted/s<th>");
    for (n, (name, spent)) in outcome.processes.iter().enumerate() {
        let seconds = outcome.seconds.max(1e-9);
        let _ = write!(page, "<tr><td>{}", escape(name));
        cell(page, outcome.per_unit(spent.cpu_us() as f64));
        cell(page, Some(spent.cpu_us() as f64 / 1e4 / seconds));
        cell(page, Some(spent.rss_kib as f64 / 1024.0));
        cell(page, Some(spent.voluntary_switches as f64 / seconds));
        cell(page, Some(spent.involuntary_switches as f64 / seconds));
        let _ = write!(
            page,
            "<td><svg viewBox='0 0 160 12' width=160 height=12 style='margin:0'><rect width='{:.1}' height=12 \
             fill='{}'/></svg>",
            160.0 * spent.cpu_us() as f64 / widest,
            COLOURS[n % COLOURS.len()]
        );
    }
    page.push_str("</table>");
}

/// Bars of the repeats' rates.
fn repeats(page: &mut String, runs: &[Outcome], median: f64) {
    let highest = runs.iter().map(|run| run.rate_per_s).fold(median, f64::max).max(1e-9) * 1.05;
    let y = |rate: f64| TOP + (1.0 - rate / highest) * (HEIGHT / 2.0 - BOTTOM - TOP);
    let bottom = y(0.0);
    let step = ((WIDTH - LEFT) / runs.len() as f64).min(80.0);
    open(page, HEIGHT / 2.0);
    for (n, run) in runs.iter().enumerate() {
        let (x, top) = (LEFT + step * n as f64, y(run.rate_per_s));
        let _ = write!(
            page,
            "<rect x='{:.1}' y='{top:.1}' width='{:.1}' height='{:.1}' fill='{}'/>\
             <text x='{:.1}' y='{:.1}' text-anchor=middle>{}</text>",
            x + 4.0,
            step - 8.0,
            bottom - top,
            COLOURS[0],
            x + step / 2.0,
            bottom + 16.0,
            short(run.rate_per_s)
        );
    }
    let line = y(median);
    let right = LEFT + step * runs.len() as f64;
    let _ =
        write!(page, "<path d='M{LEFT} {line:.1}H{right:.1}' stroke='{}' stroke-dasharray='4 4'/></svg>", COLOURS[1]);
}

/// Latency against "one of so many", both on logarithmic scales.
fn curves(page: &mut String, phases: &[Phase]) {
    let points = || phases.iter().flat_map(|phase| &phase.median.curve).filter(|(_, ms)| *ms > 0.0);
    let lowest = points().map(|(_, ms)| *ms).fold(f64::INFINITY, f64::min).log10().floor();
    let highest = points().map(|(_, ms)| *ms).fold(0.0, f64::max).log10().ceil().max(lowest + 1.0);
    let rarest = points().filter(|(p, _)| *p < 100.0).map(|(p, _)| one_of(*p)).fold(1.0, f64::max).ceil();
    let x = |percent: f64| LEFT + one_of(percent).min(rarest) / rarest * (WIDTH - LEFT - RIGHT);
    let y = |ms: f64| TOP + (highest - ms.log10()) / (highest - lowest) * (HEIGHT - BOTTOM - TOP);
    open(page, HEIGHT + 18.0 * phases.len() as f64);
    for decade in 0..=rarest as u32 {
        let percent = 100.0 - 100.0 * 10f64.powi(-(decade as i32));
        let at = x(percent);
        let _ = write!(
            page,
            "<path d='M{at:.1} {TOP}V{0:.1}' stroke='#8884'/><text x='{at:.1}' y='{1:.1}' text-anchor=middle>{2}</text>",
            HEIGHT - BOTTOM,
            HEIGHT - BOTTOM + 18.0,
            if decade == 0 { "0 %".into() } else { format!("{percent:.*} %", decade.saturating_sub(2) as usize) }
        );
    }
    for decade in lowest as i32..=highest as i32 {
        let (ms, at, right) = (10f64.powi(decade), y(10f64.powi(decade)), WIDTH - RIGHT);
        let _ = write!(
            page,
            "<path d='M{LEFT} {at:.1}H{right}' stroke='#8884'/><text x='{:.1}' y='{:.1}' text-anchor=end>{} ms</text>",
            LEFT - 6.0,
            at + 4.0,
            short(ms)
        );
    }
    for (n, phase) in phases.iter().enumerate().filter(|(_, phase)| !phase.median.curve.is_empty()) {
        let colour = COLOURS[n % COLOURS.len()];
        let line: Vec<String> = phase
            .median
            .curve
            .iter()
            .filter(|(_, ms)| *ms > 0.0)
            .map(|(percent, ms)| format!("{:.1},{:.1}", x(*percent), y(*ms)))
            .collect();
        let legend = HEIGHT + 18.0 * n as f64;
        let _ = write!(
            page,
            "<polyline fill=none stroke='{colour}' stroke-width=2 points='{}'/>\
             <path d='M{LEFT} {legend:.1}h24' stroke='{colour}' stroke-width=3/><text x='{:.1}' y='{:.1}'>{}</text>",
            line.join(" "),
            LEFT + 32.0,
            legend + 4.0,
            escape(&phase.name)
        );
    }
    page.push_str("</svg>");
}

/// 99 % is 2, 99.9 % is 3: how many decades of "one of".
fn one_of(percent: f64) -> f64 {
    if percent >= 100.0 { f64::INFINITY } else { -((100.0 - percent) / 100.0).log10() }
}

fn open(page: &mut String, height: f64) {
    let _ = write!(page, "<svg viewBox='0 0 {WIDTH} {height}' width='{WIDTH}' height='{height}' role=img>");
}

/// Three digits that count.
fn short(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 1.0 => format!("{value:.2}"),
        v if v >= 0.01 => format!("{value:.3}"),
        _ => format!("{value:.5}"),
    }
}

fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, time::Duration};

    use super::*;
    use crate::{
        Histogram, Size, Spent, Timing,
        report::{Cluster, Worker},
    };

    #[test]
    fn a_page_needs_nothing_from_elsewhere_and_runs_nothing() {
        let mut histogram = Histogram::new();
        (1..2_000).for_each(|n| histogram.record(Duration::from_micros(n)));
        let mut outcome = Outcome::counted(1.0, 2_000, 1, &histogram);
        outcome.first_error = Some("<script>alert(1)</script>".into());
        outcome = outcome.with_processes(Spent { user_us: 7, ..Spent::default() }, BTreeMap::new());
        let timing = Timing { warm_up_s: 1.0, seconds: 1.0, repeats: 2 };
        let mut report = Report::begin("send", Cluster::local(Size::default()), &"<b>", timing);
        let (process, address) = ("bench-1".into(), "<b>:7".into());
        report.workers = vec![Worker { process, address, machine: report.machine.clone() }];
        report.phases = vec![Phase::new("a & b", vec![outcome.clone(), outcome]), Phase::new("empty", vec![])];
        let page = page(&report);
        assert!(!page.contains("<script") && !page.contains("<b>") && page.contains("a &amp; b"));
        for from_elsewhere in ["http:", "https:", "src=", "url(", "@import", "href="] {
            assert!(!page.contains(from_elsewhere), "{from_elsewhere}");
        }
        assert!(page.contains("<polyline") && !page.contains("NaN") && !page.contains("inf"), "{page}");
    }
}
