//! Compiles `proto/` with protox, so that no machine needs protoc. Writes the descriptor set for gRPC reflection.

use std::{env, error::Error, fs, path::PathBuf};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files = [
        "stentor/v1/event.proto",
        "stentor/v1/client.proto",
        "stentor/v1/api.proto",
        "stentor/internal/v1/command.proto",
        "stentor/internal/v1/row.proto",
        "stentor/internal/v1/peer.proto",
        "stentor/internal/v1/gateway.proto",
        "stentor/internal/v1/bench.proto",
    ];
    let descriptors = protox::compile(files, ["proto"])?;
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("no OUT_DIR")?);
    fs::write(out.join("descriptors.bin"), protox::prost::Message::encode_to_vec(&descriptors))?;
    tonic_prost_build::configure()
        .bytes(".")
        // The transport crate owns sockets; generated clients take any tower service.
        .build_transport(false)
        .compile_fds(descriptors)?;
    Ok(())
}
