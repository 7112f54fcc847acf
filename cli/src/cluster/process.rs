//! The processes of a cluster: started so that they outlive the command, signalled by pid, waited for by their probes.
//! Must never signal a process that is not the node it was started as: pids are used again.

use std::{
    fs::{self, File},
    os::unix::process::CommandExt,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal};
use stentor_transport::probe;

use crate::{
    cluster_file::{Node, Role},
    failure::Failure,
    layout,
};

const PROBE_WITHIN: Duration = Duration::from_secs(1);
/// Between two looks at a process that starts or stops.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// How many threads tokio's runtime takes.
const WORKERS: &str = "TOKIO_WORKER_THREADS";

/// Starts a node in a process group of its own, its output appended to its log. `nodes` share this machine.
pub(crate) fn spawn(dir: &Path, node: &Node, nodes: usize) -> Result<Child, Failure> {
    let log_path = layout::log_path(dir, &node.name);
    let failed = |error| Failure::failed(format_args!("cannot start {}: {error}", node.name));
    fs::create_dir_all(dir.join("logs")).map_err(failed)?;
    let log = File::options().create(true).append(true).open(&log_path).map_err(failed)?;
    let verb = match node.role {
        Role::Broker => "broker",
        Role::Gateway => "gateway",
    };
    let mut command = Command::new(std::env::current_exe().map_err(failed)?);
    if std::env::var_os(WORKERS).is_none() {
        // A runtime takes a thread a core; together they would only wake one another.
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        command.env(WORKERS, (cores / nodes.max(1)).max(1).to_string());
    }
    command
        .arg(verb)
        .arg("--config")
        .arg(layout::config_path(dir, &node.name))
        .stdin(Stdio::null())
        .stdout(log.try_clone().map_err(failed)?)
        .stderr(log)
        // Ctrl-C at the command must not reach the cluster.
        .process_group(0)
        .spawn()
        .map_err(failed)
}

/// Whether the node's process is there, and is that node's. One that is dying still is: it holds its ports and its
/// data directory until its last thread, perhaps in an fsync, has ended.
pub(crate) fn is_running(dir: &Path, node: &Node) -> bool {
    let Some(pid) = node.pid else { return false };
    match state_of(Path::new(&format!("/proc/{pid}"))) {
        None => false,
        Some(State::Dead) => has_living_threads(pid),
        Some(State::Alive) => {
            let config = layout::config_path(dir, &node.name);
            fs::read(format!("/proc/{pid}/cmdline"))
                .is_ok_and(|line| line.split(|&b| b == 0).any(|arg| arg == config.as_os_str().as_encoded_bytes()))
        }
    }
}

/// Whether the node's process has been killed and is still ending.
pub(crate) fn is_dying(node: &Node) -> bool {
    let Some(pid) = node.pid else { return false };
    state_of(Path::new(&format!("/proc/{pid}"))) == Some(State::Dead) && has_living_threads(pid)
}

#[derive(PartialEq, Eq)]
enum State {
    Alive,
    /// A zombie: only its exit code is left, of this thread at least.
    Dead,
}

/// From `stat`, where the state follows the command's name, which is in parentheses.
fn state_of(proc: &Path) -> Option<State> {
    let stat = fs::read_to_string(proc.join("stat")).ok()?;
    match stat.rsplit_once(") ")?.1.chars().next()? {
        'Z' | 'X' => Some(State::Dead),
        _ => Some(State::Alive),
    }
}

fn has_living_threads(pid: u32) -> bool {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return false };
    tasks.flatten().any(|task| state_of(&task.path()) == Some(State::Alive))
}

/// Sends a signal to the node's process, if it is there.
pub(crate) fn signal(dir: &Path, node: &Node, signal: Signal) -> Result<(), Failure> {
    let pid = node.pid.filter(|_| is_running(dir, node)).and_then(|pid| Pid::from_raw(pid as i32));
    let Some(pid) = pid else { return Ok(()) };
    match rustix::process::kill_process(pid, signal) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(error) => Err(Failure::failed(format_args!("cannot signal {}: {error}", node.name))),
    }
}

/// Waits until the node's process is gone; false when it still is there at the deadline.
pub(crate) async fn gone(dir: &Path, node: &Node, deadline: Instant) -> bool {
    while is_running(dir, node) {
        if Instant::now() >= deadline {
            return false;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
    true
}

/// Waits until these nodes are `/readyz`, and says so of each. One that ends fails it at once: the others may need it.
pub(crate) async fn ready(
    dir: &Path,
    nodes: &[Node],
    deadline: Instant,
    mut has_ended: impl FnMut(&Node) -> bool,
    mut is_ready: impl FnMut(),
) -> Result<(), Failure> {
    let mut waited_for: Vec<&Node> = nodes.iter().collect();
    loop {
        if let Some(node) = nodes.iter().find(|node| has_ended(node)) {
            return Err(Failure::failed(format_args!("{} has ended; {}", node.name, last_words(dir, node))));
        }
        let mut late = Vec::new();
        for node in waited_for {
            let http = node.http.ok_or_else(|| Failure::failed(format_args!("{} has no probes", node.name)))?;
            match probe::status(http, "/readyz", PROBE_WITHIN).await {
                Ok(200) => is_ready(),
                _ => late.push(node),
            }
        }
        let Some(node) = late.first() else { return Ok(()) };
        if Instant::now() >= deadline {
            return Err(Failure::failed(format_args!("{} is not ready in time; {}", node.name, last_words(dir, node))));
        }
        waited_for = late;
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// The end of a node's log: why it ended, most likely.
fn last_words(dir: &Path, node: &Node) -> String {
    let path = layout::log_path(dir, &node.name);
    let text = fs::read(&path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    match text.lines().rev().find(|line| !line.trim().is_empty()) {
        Some(line) => format!("its last words: {line}"),
        None => format!("it said nothing in {}", path.display()),
    }
}
