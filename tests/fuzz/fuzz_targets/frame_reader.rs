//! Fuzz target `frame_reader`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| kinoflock_fuzz::targets::run("frame_reader", data));
