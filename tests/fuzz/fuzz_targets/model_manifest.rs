//! Fuzz target `model_manifest`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| kinoflock_fuzz::targets::run("model_manifest", data));
