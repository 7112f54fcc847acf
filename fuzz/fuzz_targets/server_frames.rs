//! `cargo fuzz run server_frames`; built without it, this replays the files that it is given. See `stentor_fuzz::server_frames`.
#![cfg_attr(fuzzing, no_main)]

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|data: &[u8]| stentor_fuzz::server_frames(data));

#[cfg(not(fuzzing))]
fn main() -> std::io::Result<()> {
    stentor_fuzz::replay(stentor_fuzz::server_frames)
}
