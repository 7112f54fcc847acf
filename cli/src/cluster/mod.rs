//! `stentor cluster`: a cluster of real processes in a folder, for development, tests and chaos. The processes outlive
//! the command. One command at a time works on a folder; what it did stands in the folder, never only in memory.

mod process;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::process::Signal;
use serde::{Deserialize, Serialize};

use crate::{
    args::{ClusterVerb, NodeRole},
    cluster_file::{self, ClusterFile, Node, Role},
    failure::Failure,
    layout,
    output::Output,
    ports::Ports,
};

/// A node that is not ready by then never will be.
const READY_WITHIN: Duration = Duration::from_secs(60);
/// A broker writes its last checkpoint, a gateway says good-bye; what takes longer hangs.
const STOP_WITHIN: Duration = Duration::from_secs(30);
/// How often a progress bar shows that time passes.
const BAR_EVERY: Duration = Duration::from_millis(200);
/// SIGKILL cannot be refused; this is for a process stuck in the kernel.
const KILL_WITHIN: Duration = Duration::from_secs(10);

/// Runs one verb.
pub(crate) async fn run(verb: ClusterVerb, output: Output) -> Result<(), Failure> {
    match verb {
        ClusterVerb::Up { folder, brokers, gateways, shards } => {
            let mut folder = Folder::open_or_create(&folder.dir, layout::Size { brokers, gateways, shards })?;
            folder.start_all(output).await?;
            folder.print_status(output)
        }
        ClusterVerb::Start { name, folder } => Folder::open(&folder.dir)?.start(&[name], output).await,
        ClusterVerb::Stop { name, folder } => Folder::open(&folder.dir)?.stop(&[name], output).await,
        ClusterVerb::Kill { name, folder } => Folder::open(&folder.dir)?.kill(&name).await,
        ClusterVerb::Add { role: NodeRole::Broker, .. } => Err(Failure::NotBuilt("`cluster add --role broker`".into())),
        ClusterVerb::Add { zone: Some(_), .. } => Err(Failure::NotBuilt("`cluster add --zone`".into())),
        ClusterVerb::Add { role: NodeRole::Gateway, folder, .. } => {
            Folder::open(&folder.dir)?.add_gateway(output).await
        }
        ClusterVerb::Remove { name, folder } => Folder::open(&folder.dir)?.remove(&name, output).await,
        ClusterVerb::Status(folder) => Folder::open(&folder.dir)?.print_status(output),
        ClusterVerb::Down(folder) => Folder::open(&folder.dir)?.down(output).await,
    }
}

/// What a node was last told; tells a stopped one from a killed one from one that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Order {
    Start,
    Stop,
    Kill,
}

/// How a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    Running,
    Stopped,
    Killed,
    Failed,
}

impl State {
    fn text(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Stopped => "stopped",
            Self::Killed => "killed",
            Self::Failed => "failed",
        }
    }
}

/// A cluster's folder, locked against other commands while it may change.
struct Folder {
    dir: PathBuf,
    file: ClusterFile,
    orders: BTreeMap<String, Order>,
    /// Ports that were chosen and are not yet bound.
    ports: Option<Ports>,
    /// Given back while waiting for nodes to become ready: a broker may need others, which other commands start.
    lock: Option<File>,
}

impl Folder {
    fn open(dir: &Path) -> Result<Self, Failure> {
        let nothing = || Failure::misuse(format_args!("there is no cluster in {}", dir.display()));
        let dir = dir.canonicalize().map_err(|_| nothing())?;
        let lock = lock(&dir)?;
        let file = ClusterFile::read(&dir)?.ok_or_else(nothing)?;
        Self::of(dir, file, None, lock)
    }

    fn open_or_create(dir: &Path, size: layout::Size) -> Result<Self, Failure> {
        let failed = |error| Failure::failed(format_args!("cannot use {}: {error}", dir.display()));
        fs::create_dir_all(dir).map_err(failed)?;
        // Absolute, since cluster.json and the configurations are read from elsewhere.
        let dir = dir.canonicalize().map_err(failed)?;
        let lock = lock(&dir)?;
        if let Some(file) = ClusterFile::read(&dir)? {
            return Self::of(dir, file, None, lock);
        }
        let mut ports = Ports::lock();
        let file = layout::create(&dir, size, &mut ports)?;
        file.write(&dir)?;
        Self::of(dir, file, Some(ports), lock)
    }

    fn of(dir: PathBuf, file: ClusterFile, ports: Option<Ports>, lock: File) -> Result<Self, Failure> {
        let orders = match fs::read(dir.join("orders.json")) {
            Ok(text) => serde_json::from_slice(&text)
                .map_err(|error| Failure::failed(format_args!("{}/orders.json is damaged: {error}", dir.display())))?,
            Err(_) => BTreeMap::new(),
        };
        Ok(Self { dir, file, orders, ports, lock: Some(lock) })
    }

    fn node(&self, name: &str) -> Result<Node, Failure> {
        let known = self.file.nodes.iter().find(|node| node.name == name).cloned();
        known.ok_or_else(|| Failure::misuse(format_args!("there is no node {name}")))
    }

    fn order(&mut self, name: &str, order: Order) -> Result<(), Failure> {
        self.orders.insert(name.to_owned(), order);
        let text = serde_json::to_vec_pretty(&self.orders).map_err(Failure::failed)?;
        cluster_file::replace(&self.dir.join("orders.json"), &text).map_err(Failure::failed)
    }

    async fn start_all(&mut self, output: Output) -> Result<(), Failure> {
        let names: Vec<String> = self.file.nodes.iter().map(|node| node.name.clone()).collect();
        self.start(&names, output).await
    }

    /// Starts those that are not running, all at once, and waits until all are ready.
    async fn start(&mut self, names: &[String], output: Output) -> Result<(), Failure> {
        let deadline = Instant::now() + READY_WITHIN;
        // Kept until the end: a child that ends early must not be mistaken for one that runs.
        let mut children = Vec::new();
        for name in names {
            let node = self.node(name)?;
            if process::is_dying(&node) && !process::gone(&self.dir, &node, deadline).await {
                return Err(Failure::failed(format_args!("{name} was killed and does not end")));
            }
            if process::is_running(&self.dir, &node) {
                continue;
            }
            output.news(&format!("starting {name}"));
            self.order(name, Order::Start)?;
            let child = process::spawn(&self.dir, &node, self.file.nodes.len())?;
            let pid = child.id();
            children.push((name.clone(), child));
            self.file.nodes.iter_mut().filter(|n| n.name == *name).for_each(|n| n.pid = Some(pid));
            self.file.write(&self.dir)?;
        }
        self.lock = None;
        let bar = output.progress(names.len() as u64, "ready");
        bar.enable_steady_tick(BAR_EVERY);
        let nodes = names.iter().map(|name| self.node(name)).collect::<Result<Vec<_>, _>>()?;
        let dir = self.dir.clone();
        // A child of this command has another command line until it is fully there.
        let has_ended = |node: &Node| match children.iter_mut().find(|(name, _)| *name == node.name) {
            Some((_, child)) => child.try_wait().is_ok_and(|status| status.is_some()),
            None => !process::is_running(&dir, node),
        };
        process::ready(&self.dir, &nodes, deadline, has_ended, || bar.inc(1)).await?;
        bar.finish_and_clear();
        // Bound by now.
        self.ports = None;
        Ok(())
    }

    /// SIGTERM, all at once, then waits.
    async fn stop(&mut self, names: &[String], output: Output) -> Result<(), Failure> {
        for name in names {
            let node = self.node(name)?;
            self.order(name, Order::Stop)?;
            process::signal(&self.dir, &node, Signal::TERM)?;
        }
        let deadline = Instant::now() + STOP_WITHIN;
        let bar = output.progress(names.len() as u64, "stopped");
        bar.enable_steady_tick(BAR_EVERY);
        for name in names {
            let node = self.node(name)?;
            if !process::gone(&self.dir, &node, deadline).await {
                return Err(Failure::failed(format_args!("{name} has not stopped within {STOP_WITHIN:?}")));
            }
            bar.inc(1);
            bar.suspend(|| output.news(&format!("{name} has stopped")));
        }
        bar.finish_and_clear();
        Ok(())
    }

    async fn kill(&mut self, name: &str) -> Result<(), Failure> {
        let node = self.node(name)?;
        self.order(name, Order::Kill)?;
        process::signal(&self.dir, &node, Signal::KILL)?;
        match process::gone(&self.dir, &node, Instant::now() + KILL_WITHIN).await {
            true => Ok(()),
            false => Err(Failure::failed(format_args!("{name} survived SIGKILL for {KILL_WITHIN:?}"))),
        }
    }

    async fn add_gateway(&mut self, output: Output) -> Result<(), Failure> {
        let mut ports = Ports::lock();
        let node = layout::add_gateway(&self.dir, &mut self.file, &mut ports)?;
        self.ports = Some(ports);
        self.file.write(&self.dir)?;
        self.start(std::slice::from_ref(&node.name), output).await?;
        match output.json() {
            true => output.value(&NodeStatus::of(self, &self.node(&node.name)?)),
            false => output.text(&node.name),
        }
    }

    async fn remove(&mut self, name: &str, output: Output) -> Result<(), Failure> {
        if self.node(name)?.role == Role::Broker {
            return Err(Failure::NotBuilt("`cluster remove` of a broker".into()));
        }
        self.stop(&[name.to_owned()], output).await?;
        self.file.nodes.retain(|node| node.name != name);
        self.file.write(&self.dir)
    }

    /// Gateways first, so that devices hear it from them; then the brokers. A stopped cluster can be started again.
    async fn down(&mut self, output: Output) -> Result<(), Failure> {
        for role in [Role::Gateway, Role::Broker] {
            let running = self.file.nodes.iter().filter(|n| n.role == role && process::is_running(&self.dir, n));
            let names: Vec<String> = running.map(|node| node.name.clone()).collect();
            if let Err(late) = self.stop(&names, output).await {
                output.notice(&format!("{late:?}; killing what is left"));
                for name in names {
                    self.kill(&name).await?;
                }
            }
        }
        Ok(())
    }

    fn state(&self, node: &Node) -> State {
        if process::is_running(&self.dir, node) {
            return State::Running;
        }
        match self.orders.get(&node.name) {
            Some(Order::Start) => State::Failed,
            Some(Order::Kill) => State::Killed,
            Some(Order::Stop) | None => State::Stopped,
        }
    }

    fn print_status(&self, output: Output) -> Result<(), Failure> {
        let nodes: Vec<NodeStatus> = self.file.nodes.iter().map(|node| NodeStatus::of(self, node)).collect();
        if output.json() {
            return output.value(&serde_json::json!({ "cluster_id": self.file.cluster_id, "nodes": nodes }));
        }
        let cell = |address: Option<std::net::SocketAddr>| address.map_or("-".to_owned(), |a| a.to_string());
        let mut rows = vec![["node", "state", "pid", "api", "quic", "http"].map(str::to_owned).to_vec()];
        rows.extend(nodes.iter().map(|status| {
            let (node, pid) = (&status.node, status.node.pid.map_or("-".to_owned(), |pid| pid.to_string()));
            let state = output.verdict(status.state == State::Running, status.state.text());
            vec![node.name.clone(), state, pid, cell(node.api), cell(node.quic), cell(node.http)]
        }));
        output.table(&rows)
    }
}

/// A node as `status` prints it: its pid is null unless it runs.
#[derive(Serialize)]
struct NodeStatus {
    #[serde(flatten)]
    node: Node,
    state: State,
}

impl NodeStatus {
    fn of(folder: &Folder, node: &Node) -> Self {
        let state = folder.state(node);
        Self { node: Node { pid: node.pid.filter(|_| state == State::Running), ..node.clone() }, state }
    }
}

/// Waits for a command that works on the same folder: scripts run them side by side.
fn lock(dir: &Path) -> Result<File, Failure> {
    let path = dir.join("cluster.lock");
    let file = File::options().write(true).create(true).truncate(false).open(&path);
    file.and_then(|file| file.lock().map(|()| file))
        .map_err(|error| Failure::failed(format_args!("cannot lock {}: {error}", path.display())))
}
