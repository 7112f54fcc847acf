//! `stentor dev`: a whole cluster in this process, 3 brokers and 1 gateway over real sockets on loopback, with keys and
//! users ready. For development only: its keys are made here, lie in its folder, and sign for anybody.

mod cluster;
mod home;

use crate::{args::DevArgs, demo, failure::Failure, output::Output};

pub(crate) use cluster::DevCluster;
pub(crate) use home::Home;

/// Runs until Ctrl-C, or with `--exit` until the demo is done.
pub(crate) async fn run(args: DevArgs, output: Output) -> Result<(), Failure> {
    // Before anything is started: a path that has no conversations is found out at once.
    let plan = args.demo.as_ref().map(|path| demo::load(path.as_deref())).transpose()?;
    let home = Home::open(args.dir.as_deref())?;
    output.news(&format!("starting 3 brokers and 1 gateway in {}", home.dir().display()));
    let bar = output.progress(0, "starting");
    bar.enable_steady_tick(std::time::Duration::from_millis(200));
    let started = DevCluster::start(&home, args.shards).await;
    bar.finish_and_clear();
    let cluster = started?;
    let ended = serve(&args, plan, &cluster, output).await;
    output.news("stopping");
    let stopped = cluster.stop().await;
    ended.and(stopped)
}

async fn serve(args: &DevArgs, plan: Option<demo::Plan>, cluster: &DevCluster, output: Output) -> Result<(), Failure> {
    if !args.json || plan.is_none() {
        introduce(cluster, args.dir.is_some(), output)?;
    }
    let stop = stop_signal()?;
    tokio::pin!(stop);
    let mut outcome = Ok(());
    if let Some(plan) = plan {
        tokio::select! {
            report = demo::run(cluster.file(), plan, output) => outcome = report?.print(output)?,
            () = &mut stop => return Err(Failure::failed("stopped before the demo was done")),
            failed = cluster.failed() => return Err(failed),
        }
        output.flush()?;
        if args.exit {
            return outcome;
        }
    } else if args.exit {
        return Ok(());
    }
    output.news("running; Ctrl-C stops it");
    tokio::select! {
        () = stop => outcome,
        failed = cluster.failed() => Err(failed),
    }
}

/// Tells where everything is, before anything else is printed.
fn introduce(cluster: &DevCluster, keeps_folder: bool, output: Output) -> Result<(), Failure> {
    let file = cluster.file();
    if output.json() {
        return output.value(file).and_then(|()| output.flush());
    }
    let address = |address: Option<std::net::SocketAddr>| address.map_or("-".to_owned(), |a| a.to_string());
    let mut rows = vec![["node", "api", "quic", "http"].map(str::to_owned).to_vec()];
    rows.extend(file.nodes.iter().map(|n| vec![n.name.clone(), address(n.api), address(n.quic), address(n.http)]));
    output.table(&rows)?;
    output.text("")?;
    output.text(&format!("CA           {}", file.ca.display()))?;
    output.text(&format!("admin token  {}", file.admin_token))?;
    for user in &file.users {
        output.text(&format!("{:<12} {}", user.user, user.token))?;
    }
    output.text("development keys: tokens are signed with a key that lies in the folder")?;
    if keeps_folder {
        output
            .text(&format!("try: stentor conversation create --participant bob --dir {}", cluster.dir().display()))?;
    }
    output.flush()
}

/// Ctrl-C or SIGTERM.
pub(crate) fn stop_signal() -> Result<impl Future<Output = ()>, Failure> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate()).map_err(Failure::failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(Failure::failed)?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}
