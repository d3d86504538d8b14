//! Messages of the wire protocol, as a client may send them to the proxy.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u16, Vec<u8>)| {
    let (cut, mut bytes) = input;
    // Most would fail at their length otherwise.
    if let (Ok(length), Some(place)) = (i32::try_from(bytes.len()), bytes.first_chunk_mut::<4>()) {
        *place = length.to_le_bytes();
    }
    mongo_proxy::fuzzing::message(&bytes, usize::from(cut));
});
