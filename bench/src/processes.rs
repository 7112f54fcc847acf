//! What processes cost, as the kernel has it in `/proc`: CPU, memory, context switches, bytes written. Must never touch
//! the processes, nor make up what may not be read.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

/// A process at one moment; counters are since its start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// CPU time outside of the kernel, in steps of a clock tick (10 ms).
    pub user_us: u64,
    /// CPU time inside of the kernel, in the same steps.
    pub system_us: u64,
    /// Memory that is resident.
    pub rss_kib: u64,
    /// The part of it that is no file's.
    pub anonymous_kib: u64,
    /// How often living threads gave up the CPU to wait.
    pub voluntary_switches: u64,
    /// How often it was taken from them.
    pub involuntary_switches: u64,
    /// What it sent to storage; `None` where the kernel does not let us read it.
    pub write_bytes: Option<u64>,
}

/// What a process used between two moments, and its memory at the second.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spent {
    /// CPU time outside of the kernel.
    pub user_us: u64,
    /// CPU time inside of the kernel.
    pub system_us: u64,
    /// Memory that is resident, at the end.
    pub rss_kib: u64,
    /// The part of it that is no file's, at the end.
    pub anonymous_kib: u64,
    /// How often its threads gave up the CPU to wait.
    pub voluntary_switches: u64,
    /// How often it was taken from them.
    pub involuntary_switches: u64,
    /// What it sent to storage.
    pub write_bytes: Option<u64>,
}

impl Usage {
    /// Of a process by its number; an error when there is none, or it may not be read.
    pub fn of(pid: u32) -> io::Result<Self> {
        Self::read(&PathBuf::from(format!("/proc/{pid}")))
    }

    /// Of this process.
    pub fn own() -> io::Result<Self> {
        Self::read(Path::new("/proc/self"))
    }

    fn read(proc_dir: &Path) -> io::Result<Self> {
        let stat = fs::read_to_string(proc_dir.join("stat"))?;
        let (user_ticks, system_ticks) = ticks(&stat).ok_or_else(|| unreadable(proc_dir, "stat"))?;
        let status = fs::read_to_string(proc_dir.join("status"))?;
        let io = fs::read_to_string(proc_dir.join("io")).ok();
        let (mut voluntary_switches, mut involuntary_switches) = (0, 0);
        for task in fs::read_dir(proc_dir.join("task"))? {
            // A thread may end while we look.
            let Ok(status) = fs::read_to_string(task?.path().join("status")) else { continue };
            voluntary_switches += field(&status, "voluntary_ctxt_switches:").unwrap_or(0);
            involuntary_switches += field(&status, "nonvoluntary_ctxt_switches:").unwrap_or(0);
        }
        Ok(Self {
            user_us: user_ticks * tick_us(),
            system_us: system_ticks * tick_us(),
            // A process that is ending has none.
            rss_kib: field(&status, "VmRSS:").unwrap_or(0),
            anonymous_kib: field(&status, "RssAnon:").unwrap_or(0),
            voluntary_switches,
            involuntary_switches,
            write_bytes: io.and_then(|io| field(&io, "write_bytes:")),
        })
    }

    /// What was used since an earlier moment of the same process.
    pub fn since(&self, earlier: &Self) -> Spent {
        Spent {
            user_us: self.user_us.saturating_sub(earlier.user_us),
            system_us: self.system_us.saturating_sub(earlier.system_us),
            rss_kib: self.rss_kib,
            anonymous_kib: self.anonymous_kib,
            // Threads that have ended took their counts along.
            voluntary_switches: self.voluntary_switches.saturating_sub(earlier.voluntary_switches),
            involuntary_switches: self.involuntary_switches.saturating_sub(earlier.involuntary_switches),
            write_bytes: self.write_bytes.zip(earlier.write_bytes).map(|(now, then)| now.saturating_sub(then)),
        }
    }
}

impl Spent {
    /// CPU time, inside and outside of the kernel.
    pub fn cpu_us(&self) -> u64 {
        self.user_us + self.system_us
    }

    /// Both together, for a server that is several processes.
    pub fn plus(&self, other: &Self) -> Self {
        Self {
            user_us: self.user_us + other.user_us,
            system_us: self.system_us + other.system_us,
            rss_kib: self.rss_kib + other.rss_kib,
            anonymous_kib: self.anonymous_kib + other.anonymous_kib,
            voluntary_switches: self.voluntary_switches + other.voluntary_switches,
            involuntary_switches: self.involuntary_switches + other.involuntary_switches,
            write_bytes: self.write_bytes.zip(other.write_bytes).map(|(a, b)| a + b),
        }
    }
}

fn tick_us() -> u64 {
    1_000_000 / rustix::param::clock_ticks_per_second().max(1)
}

/// CPU time of a process's living threads in µs, by what their names have in common, in steps of a clock tick. A
/// thread that ends takes its time along.
pub fn threads(pid: u32) -> BTreeMap<String, u64> {
    let mut all = BTreeMap::new();
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return all };
    for task in tasks.flatten() {
        let read = |file| fs::read_to_string(task.path().join(file)).ok();
        let (Some(name), Some(stat)) = (read("comm"), read("stat")) else { continue };
        let (user, system) = ticks(&stat).unwrap_or_default();
        *all.entry(kind(&name)).or_default() += (user + system) * tick_us();
    }
    all
}

/// A name without the number of the one thread, fit for a figure: `rocksdb:low7` and `rocksdb:low8` are one.
fn kind(comm: &str) -> String {
    let name = comm.trim().trim_end_matches(|c: char| c.is_ascii_digit());
    name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '_' }).collect()
}

/// User and system time of a `stat` line. The name in it may contain anything, also blanks and brackets.
fn ticks(stat: &str) -> Option<(u64, u64)> {
    let after_name = &stat[stat.rfind(')')? + 1..];
    let mut fields = after_name.split_ascii_whitespace().skip(11);
    Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
}

/// A number behind a name at the start of a line.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

fn unreadable(proc_dir: &Path, file: &str) -> io::Error {
    io::Error::other(format!("{}/{file} is not as expected", proc_dir.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_brackets_does_not_shift_the_times() {
        let stat = "7 (a) b (c)) S 1 7 7 0 -1 4194560 100 0 0 0 250 40 0 0 20 0 3 0 5 1000 10";
        assert_eq!(ticks(stat), Some((250, 40)));
        assert_eq!(ticks("nonsense"), None);
    }

    #[test]
    fn threads_are_summed_by_the_kind_of_their_name() {
        assert_eq!(
            (kind("rocksdb:low7\n"), kind("tokio-rt-worker\n")),
            ("rocksdb_low".into(), "tokio_rt_worker".into())
        );
        let (stop, waits) = std::sync::mpsc::channel::<()>();
        let spawn = |n: u32| std::thread::Builder::new().name(format!("busy:one{n}"));
        let busy = spawn(1).spawn(move || {
            let mut n = 0u64;
            while waits.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty) {
                n = std::hint::black_box(n.wrapping_add(1));
            }
        });
        let began = std::time::Instant::now();
        while threads(std::process::id()).get("busy_one").is_none_or(|us| *us < 20_000) {
            assert!(began.elapsed() < std::time::Duration::from_secs(20), "a busy thread's time is seen");
        }
        drop(stop);
        busy.unwrap().join().unwrap();
        assert!(threads(u32::MAX).is_empty());
    }

    #[test]
    fn a_field_is_found_by_its_whole_name() {
        let status = "VmRSS:\t    1234 kB\nnonvoluntary_ctxt_switches:\t9\nvoluntary_ctxt_switches:\t5\n";
        assert_eq!((field(status, "VmRSS:"), field(status, "voluntary_ctxt_switches:")), (Some(1_234), Some(5)));
        assert_eq!(field(status, "RssAnon:"), None);
    }

    #[test]
    fn work_of_this_process_is_seen() {
        let before = Usage::own().unwrap();
        let mut kept = vec![0u64; 4 << 20];
        let spent = loop {
            kept.iter_mut().enumerate().for_each(|(n, slot)| *slot = slot.wrapping_add(n as u64));
            let spent = Usage::own().unwrap().since(&before);
            // Until a few ticks have passed.
            if spent.cpu_us() >= 30_000 {
                break spent;
            }
        };
        assert!(spent.anonymous_kib > 30_000 && spent.rss_kib >= spent.anonymous_kib, "{spent:?} {}", kept.len());
        assert!(Usage::of(std::process::id()).is_ok() && Usage::of(u32::MAX).is_err());
    }

    #[test]
    fn differences_and_sums_are_field_by_field() {
        let earlier = Usage { user_us: 10, system_us: 5, write_bytes: Some(100), ..Usage::default() };
        let later = Usage {
            user_us: 30,
            system_us: 6,
            rss_kib: 7,
            anonymous_kib: 3,
            voluntary_switches: 4,
            involuntary_switches: 2,
            write_bytes: Some(150),
        };
        let spent = later.since(&earlier);
        assert_eq!((spent.cpu_us(), spent.rss_kib, spent.write_bytes), (21, 7, Some(50)));
        let twice = spent.plus(&spent);
        assert_eq!((twice.cpu_us(), twice.voluntary_switches, twice.involuntary_switches), (42, 8, 4));
        assert_eq!(twice.plus(&Spent::default()).write_bytes, None, "not known of one, not known of both");
    }
}
