//! One process of a peer: started with a configuration of ours in a folder of ours, on ports that were free. Must never
//! outlive its value, nor touch a server that somebody else has started.

use std::{
    fs::{self, File},
    net::{Ipv4Addr, SocketAddr},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process_group};
use stentor_transport::bind;
use tokio::time::sleep;

use super::PeerError;

/// A server that does not answer by then has failed.
const READY_WITHIN: Duration = Duration::from_secs(60);
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Lines of its log that an error tells.
const LAST_LINES: usize = 8;

/// A process that was started here, with all that it started itself.
#[derive(Debug)]
pub(crate) struct Server {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Server {
    /// Starts it in a process group of its own; what it prints goes into `dir/NAME.log`.
    pub(crate) fn start(name: &str, mut command: Command, dir: &Path) -> Result<Self, PeerError> {
        let log = dir.join(format!("{name}.log"));
        let out = File::create(&log).and_then(|file| Ok((file.try_clone()?, file)));
        let (out, err) = out.map_err(|error| PeerError::failed(format!("write {}", log.display()), error))?;
        command.stdin(Stdio::null()).stdout(out).stderr(err).process_group(0);
        let child = command.spawn().map_err(|error| PeerError::failed(format!("start {name}"), error))?;
        Ok(Self { name: name.to_owned(), child, log })
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until a port answers.
    pub(crate) async fn listens(&mut self, port: u16) -> Result<(), PeerError> {
        let deadline = Instant::now() + READY_WITHIN;
        while !is_listened_on(port) {
            self.lives()?;
            if Instant::now() > deadline {
                return Err(PeerError::failed(format!("reach {} on port {port}", self.name), self.last_words()));
            }
            sleep(LOOK_EVERY).await;
        }
        Ok(())
    }

    /// An error with its last words when it has ended.
    pub(crate) fn lives(&mut self) -> Result<(), PeerError> {
        match self.child.try_wait() {
            Ok(None) => Ok(()),
            Ok(Some(status)) => Err(PeerError::failed(
                format!("keep {} running", self.name),
                format!("{status}; {}", self.last_words()),
            )),
            Err(error) => Err(PeerError::failed(format!("watch {}", self.name), error)),
        }
    }

    fn last_words(&self) -> String {
        let text = fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<_> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        lines[lines.len().saturating_sub(LAST_LINES)..].join(" | ")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Its data is of no use to anybody, so there is nothing to end in order.
        if let Some(group) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            let _ = kill_process_group(group, Signal::KILL);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether somebody listens on a port of this machine, as the kernel says: a connection would be one that the server
/// must deal with.
fn is_listened_on(port: u16) -> bool {
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"].map(|table| fs::read_to_string(table).unwrap_or_default());
    tables.iter().flat_map(|table| table.lines()).any(|line| listening(line) == Some(port))
}

/// The port of a line of `/proc/net/tcp` in the state LISTEN.
fn listening(line: &str) -> Option<u16> {
    const LISTEN: &str = "0A";
    let mut fields = line.split_ascii_whitespace().skip(1);
    let (local, _remote, state) = (fields.next()?, fields.next()?, fields.next()?);
    if state != LISTEN {
        return None;
    }
    u16::from_str_radix(local.rsplit_once(':')?.1, 16).ok()
}

/// Ports of the loopback interface that nobody uses, all different. Must be called within a runtime.
pub(crate) fn free_ports<const N: usize>() -> Result<[u16; N], PeerError> {
    let failed = |error: &dyn std::fmt::Display| PeerError::failed("find free ports", error);
    let held = (0..N).map(|_| bind::tcp(local(0)).map_err(|error| failed(&error)));
    let held = held.collect::<Result<Vec<_>, _>>()?;
    let mut ports = [0; N];
    for (port, listener) in ports.iter_mut().zip(&held) {
        *port = listener.local_addr().map_err(|error| failed(&error))?.port();
    }
    Ok(ports)
}

/// The loopback address with a port.
pub(crate) fn local(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

/// Where an installed program is: in `PATH`, or where Debian puts what only root starts.
pub(crate) fn installed(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let more = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(more).map(|dir| dir.join(program)).find(|file| file.is_file())
}

/// The same, or what to tell whoever asks for it.
pub(crate) fn need(program: &str) -> Result<PathBuf, PeerError> {
    installed(program).ok_or_else(|| PeerError::Missing(format!("{program} is not installed")))
}

/// A folder of its own.
pub(crate) fn folder() -> Result<tempfile::TempDir, PeerError> {
    let folder = tempfile::Builder::new().prefix("stentor-peer-").tempdir();
    folder.map_err(|error| PeerError::failed("make a folder for a peer", error))
}

/// Writes a configuration.
pub(crate) fn write(path: &Path, text: &str) -> Result<(), PeerError> {
    fs::write(path, text).map_err(|error| PeerError::failed(format!("write {}", path.display()), error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_listeners_are_found() {
        let line = |state: &str| format!("   0: 0100007F:1F90 00000000:0000 {state} 00000000:00000000 00:00000000");
        assert_eq!((listening(&line("0A")), listening(&line("01"))), (Some(8_080), None));
        assert_eq!(listening("  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt"), None);
    }

    #[tokio::test]
    async fn a_port_is_seen_as_soon_as_somebody_listens() {
        let listener = bind::tcp(local(0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(is_listened_on(port));
        drop(listener);
        let deadline = Instant::now() + Duration::from_secs(20);
        while is_listened_on(port) {
            assert!(Instant::now() < deadline);
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn ports_are_free_and_different() {
        let ports = free_ports::<8>().unwrap();
        let mut distinct = ports.to_vec();
        distinct.sort_unstable();
        distinct.dedup();
        assert_eq!(distinct.len(), ports.len());
    }

    #[tokio::test]
    async fn a_server_that_ends_is_told_with_its_last_words() {
        let dir = folder().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", "echo no such option; exit 3"]);
        let mut server = Server::start("sh", command, dir.path()).unwrap();
        let [port] = free_ports().unwrap();
        let error = server.listens(port).await.unwrap_err().to_string();
        assert!(error.contains("no such option") && error.contains('3'), "{error}");
    }

    #[test]
    fn what_a_server_started_ends_with_it() {
        let dir = folder().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", "sleep 1000 & echo $!; wait"]);
        let server = Server::start("sh", command, dir.path()).unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        let started = loop {
            let text = fs::read_to_string(dir.path().join("sh.log")).unwrap();
            if let Some(line) = text.lines().next() {
                break line.parse::<u32>().unwrap();
            }
            assert!(Instant::now() < deadline);
            std::thread::yield_now();
        };
        drop(server);
        // Reaped by whoever reaps orphans: gone, or a zombie for a moment.
        let state = || fs::read_to_string(format!("/proc/{started}/stat")).unwrap_or_default();
        while !state().is_empty() && !state().contains(") Z ") {
            assert!(Instant::now() < deadline, "the child outlived its server: {}", state());
            std::thread::yield_now();
        }
    }
}
