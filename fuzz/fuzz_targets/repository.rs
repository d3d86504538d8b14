//! Every parser of stored bytes; the first byte chooses one.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mongo_backup::fuzzing;

fuzz_target!(|bytes: &[u8]| {
    let Some((which, bytes)) = bytes.split_first() else { return };
    match which % 11 {
        0 => fuzzing::config(bytes),
        1 => fuzzing::frame(bytes),
        2 => fuzzing::index(bytes),
        3 => fuzzing::manifest(bytes),
        4 => fuzzing::pack(bytes),
        5 => fuzzing::segment(bytes),
        6 => fuzzing::block(bytes),
        7 => fuzzing::mark(bytes),
        8 => fuzzing::key(bytes),
        9 => fuzzing::slice(bytes),
        _ => fuzzing::node(bytes),
    }
});
