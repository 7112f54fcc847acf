//! Counts the fsyncs of processes that do not count their own, by the kernel's tracepoints through `perf`, which needs
//! its rights. Must never slow what it counts (no ptrace), nor take "not allowed" for zero.

use std::{
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread::JoinHandle,
    time::Duration,
};

/// How often `perf` tells what it has counted.
const INTERVAL_MS: u32 = 50;
/// It tells something within this time, or it is not allowed to count.
const FIRST_WITHIN: Duration = Duration::from_secs(3);
const EVENTS: &str = "syscalls:sys_enter_fsync,syscalls:sys_enter_fdatasync,syscalls:sys_enter_sync_file_range";

/// Counts while it lives.
#[derive(Debug)]
pub struct Fsyncs {
    perf: Child,
    counted: Arc<AtomicU64>,
    reader: Option<JoinHandle<()>>,
}

impl Fsyncs {
    /// Begins to count for these processes and the threads that they make later. `None` when `perf` is missing or may
    /// not look.
    pub fn count(pids: &[u32]) -> Option<Self> {
        let pids = pids.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
        let mut perf = Command::new("perf")
            .args(["stat", "-x", ",", "-I", &INTERVAL_MS.to_string(), "-e", EVENTS, "-p", &pids])
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .ok()?;
        let stderr = perf.stderr.take()?;
        let counted = Arc::new(AtomicU64::new(0));
        let (first, came) = mpsc::channel();
        let total = Arc::clone(&counted);
        let reader = std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                if let Some(count) = interval(&line) {
                    total.fetch_add(count, Ordering::Relaxed);
                    // Nobody listens any more after the first one.
                    let _ = first.send(());
                }
            }
        });
        let counter = Self { perf, counted, reader: Some(reader) };
        came.recv_timeout(FIRST_WITHIN).ok().map(|()| counter)
    }

    /// Calls since the beginning, up to 50 ms ago.
    pub fn so_far(&self) -> u64 {
        self.counted.load(Ordering::Relaxed)
    }
}

impl Drop for Fsyncs {
    fn drop(&mut self) {
        // It has nothing to save.
        let _ = self.perf.kill();
        let _ = self.perf.wait();
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

/// What a line of `perf stat -I -x,` counted: `seconds,count,unit,event,…`; `None` for anything else.
fn interval(line: &str) -> Option<u64> {
    let mut fields = line.trim_start().split(',');
    fields.next()?.parse::<f64>().ok()?;
    fields.next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_counts_are_counted() {
        assert_eq!(interval("     0.050123,17,,syscalls:sys_enter_fsync,50000,100.00,,"), Some(17));
        assert_eq!(interval("     0.050123,<not counted>,,syscalls:sys_enter_fsync,0,0.00,,"), None);
        assert_eq!(interval("event syntax error: 'syscalls:sys_enter_fsync'"), None);
        assert_eq!(interval("Error:"), None);
    }

    #[test]
    fn own_fsyncs_are_seen_where_the_kernel_lets_us_look() {
        let Some(counter) = Fsyncs::count(&[std::process::id()]) else { return };
        let file = tempfile::tempfile().unwrap();
        let deadline = std::time::Instant::now() + Duration::from_secs(20);
        while counter.so_far() < 5 {
            file.sync_all().unwrap();
            assert!(std::time::Instant::now() < deadline, "no fsync was counted");
        }
    }
}
