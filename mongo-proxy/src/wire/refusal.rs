//! What a client is told that is not served, in words that its driver understands.

use std::sync::atomic::{AtomicI32, Ordering::Relaxed};

use bson::{RawDocumentBuf, rawdoc};

use super::{Malformed, header::Header, reply};

/// To who sent what is no message, before its connection is closed. Without labels: it is of no use to send it again.
pub(crate) fn malformed(request: Header, why: Malformed) -> Vec<u8> {
    let (code, name) = match why {
        Malformed::Flags => (223, "IllegalOpMsgFlag"),
        Malformed::Section => (233, "TooManyDocumentSequences"),
        Malformed::Checksum => (288, "ChecksumMismatch"),
        Malformed::Bson | Malformed::Bounds => (22, "InvalidBSON"),
        Malformed::Depth => (15, "Overflow"),
        Malformed::Length | Malformed::Opcode | Malformed::Compression | Malformed::First => (17, "ProtocolError"),
    };
    let message = format!("the proxy takes this for no message of MongoDB: {why}");
    to(request, &rawdoc! { "ok": 0.0, "errmsg": message, "code": code, "codeName": name })
}

fn to(request: Header, document: &RawDocumentBuf) -> Vec<u8> {
    static NUMBER: AtomicI32 = AtomicI32::new(1);
    reply::to(request, NUMBER.fetch_add(1, Relaxed), document)
}
