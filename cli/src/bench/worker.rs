//! `stentor bench worker`: waits for coordinators with keys of the cluster, and makes load for one at a time. Must never
//! listen without keys.

use serde_json::json;
use stentor_bench::{
    Target,
    workers::{self, Keys, Service},
};
use stentor_transport::bind;

use super::{failure, work};
use crate::{
    args::bench::{KeyArgs, WorkerBenchArgs},
    dev::stop_signal,
    failure::Failure,
    output::Output,
};

/// Serves until it is stopped.
pub(super) async fn run(args: &WorkerBenchArgs, output: Output) -> Result<(), Failure> {
    super::raise_file_limit();
    let target = Target::read(&args.dir).map_err(|error| Failure::misuse(error.to_string()))?;
    let keys = keys(&target, &args.keys, "bench-worker")?;
    let tls = keys.server().map_err(failure)?;
    let listener = bind::tcp(args.listen).map_err(Failure::failed)?;
    let address = listener.local_addr().map_err(Failure::failed)?;
    let stop = stop_signal()?;
    match output.json() {
        true => output.value(&json!({ "listening": address }))?,
        false => output.text(&format!("waiting for a coordinator on {address}"))?,
    }
    output.flush()?;
    let service = Service::new(args.dir.clone(), work::bodies, move |news| output.news(news));
    workers::serve(listener, &tls, service, stop).await.map_err(failure)
}

/// Those that were named, or new ones.
pub(super) fn keys(target: &Target, args: &KeyArgs, name: &str) -> Result<Keys, Failure> {
    match (&args.cert, &args.key) {
        (Some(cert), Some(key)) => Ok(Keys::given(target, cert.clone(), key.clone())),
        _ => Keys::issued(target, name).map_err(failure),
    }
}
