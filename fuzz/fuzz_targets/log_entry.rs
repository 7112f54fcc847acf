//! `cargo fuzz run log_entry`; built without it, this replays the files that it is given. See `stentor_fuzz::log_entry`.
#![cfg_attr(fuzzing, no_main)]

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|data: &[u8]| stentor_fuzz::log_entry(data));

#[cfg(not(fuzzing))]
fn main() -> std::io::Result<()> {
    stentor_fuzz::replay(stentor_fuzz::log_entry)
}
