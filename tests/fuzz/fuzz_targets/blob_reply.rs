//! Fuzz target `blob_reply`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| kinoflock_fuzz::targets::run("blob_reply", data));
