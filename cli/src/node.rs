//! `stentor broker` and `stentor gateway`: one node from its configuration file, until SIGTERM. Never changes the file.

use std::time::Duration;

use stentor_broker::BrokerConfig;
use stentor_gateway::GatewayConfig;

use crate::{args::NodeArgs, dev::stop_signal, failure::Failure, output::Output};

fn read(args: &NodeArgs) -> Result<String, Failure> {
    std::fs::read_to_string(&args.config)
        .map_err(|error| Failure::misuse(format_args!("cannot read {}: {error}", args.config.display())))
}

fn bad(args: &NodeArgs, error: impl std::fmt::Display) -> Failure {
    Failure::misuse(format_args!("{}: {error}", args.config.display()))
}

/// How long a node may take to come up before it says what it lacks: well before `cluster up` gives up and quotes it.
const READY_WITHIN: Duration = Duration::from_secs(20);

/// Runs a broker.
pub(crate) async fn broker(args: &NodeArgs) -> Result<(), Failure> {
    let config = BrokerConfig::from_toml(&read(args)?).map_err(|error| bad(args, error))?;
    let name = config.name.clone();
    let stop = stop_signal()?;
    let broker = Box::pin(stentor_broker::start(config)).await.map_err(Failure::failed)?;
    if let Err(why) = broker.ready(READY_WITHIN).await {
        // Its peers may still be starting: it goes on, and /readyz says so too.
        Output::new(false).notice(&format!("{name}: {why}"));
    }
    let ended = tokio::select! {
        () = stop => Ok(()),
        why = broker.failed() => Err(Failure::failed(format_args!("{name} has stopped: {why}"))),
    };
    broker.shutdown().await;
    ended
}

/// Runs a gateway.
pub(crate) async fn gateway(args: &NodeArgs) -> Result<(), Failure> {
    let config = GatewayConfig::from_toml(&read(args)?).map_err(|error| bad(args, error))?;
    let stop = stop_signal()?;
    let gateway = Box::pin(stentor_gateway::start(config)).await.map_err(Failure::failed)?;
    stop.await;
    gateway.shutdown().await;
    Ok(())
}
