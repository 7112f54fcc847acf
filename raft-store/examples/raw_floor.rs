//! `raw_floor DIR VALUE_BYTES BATCH WARM_UP_S SECONDS`: synced batches into RocksDB, as JSON: what the disk and RocksDB
//! alone can do, to which a broker is set (docs/performance.md). Must never write outside of DIR.

use std::{error::Error, fmt::Write as _, path::PathBuf, time::Duration};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let mut next = || arguments.next().ok_or("say DIR VALUE_BYTES BATCH WARM_UP_S SECONDS");
    let dir = PathBuf::from(next()?).join("raw");
    let (value_bytes, batch) = (next()?.parse()?, next()?.parse()?);
    let (warm_up, measured) = (seconds(&next()?)?, seconds(&next()?)?);
    let floor = stentor_raft_store::floor::write(&dir, value_bytes, batch, (warm_up, measured))?;
    let mut batch_us = String::new();
    for (n, took) in floor.batches.iter().enumerate() {
        write!(batch_us, "{}{}", if n == 0 { "" } else { "," }, took.as_micros())?;
    }
    println!(
        "{{\"seconds\":{},\"entries\":{},\"batches\":{},\"batch_us\":[{batch_us}]}}",
        floor.elapsed.as_secs_f64(),
        floor.entries,
        floor.batches.len()
    );
    Ok(())
}

fn seconds(text: &str) -> Result<Duration, Box<dyn Error>> {
    Ok(Duration::try_from_secs_f64(text.parse()?)?)
}
