//! `cargo fuzz run command`; built without it, this replays the files that it is given. See `stentor_fuzz::command`.
#![cfg_attr(fuzzing, no_main)]

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|data: &[u8]| stentor_fuzz::command(data));

#[cfg(not(fuzzing))]
fn main() -> std::io::Result<()> {
    stentor_fuzz::replay(stentor_fuzz::command)
}
