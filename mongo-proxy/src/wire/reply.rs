//! What the proxy says itself, and what it reads of a server for itself.

use std::ops::Range;

use bson::RawDocument;

use super::{
    Malformed, bson_scan, compression,
    header::{HEADER, Header, Opcode},
    scan::Scan,
};

/// A request of the proxy's own.
pub(crate) fn request(request_id: i32, command: &RawDocument) -> Vec<u8> {
    to(Header { length: HEADER, request_id: 0, response_to: 0, opcode: Opcode::Message }, request_id, command)
}

/// A reply to a request, in the way that it was asked.
pub(crate) fn to(request: Header, request_id: i32, document: &RawDocument) -> Vec<u8> {
    let document = document.as_bytes();
    let is_query = request.opcode == Opcode::Query;
    let before = if is_query { REPLY } else { MESSAGE };
    let opcode = if is_query { Opcode::Reply } else { Opcode::Message };
    let header = Header { length: HEADER + before.len() + document.len(), request_id, response_to: request.request_id, opcode };
    let mut reply = Vec::with_capacity(header.length);
    header.write(&mut reply);
    reply.extend_from_slice(before);
    reply.extend_from_slice(document);
    reply
}

/// A reply that is there as a whole, and not compressed.
#[derive(Debug)]
pub(crate) struct Whole {
    pub(crate) header: Header,
    pub(crate) message: Vec<u8>,
    /// Where its document is in the message.
    pub(crate) body: Range<usize>,
    pub(crate) flags: u32,
}

impl Whole {
    /// Inflates and checks a reply that came with this header.
    pub(crate) fn read(reply: Header, message: Vec<u8>) -> Result<Self, Malformed> {
        let (header, message) = match reply.opcode {
            Opcode::Query => return Err(Malformed::Opcode),
            Opcode::Compressed => {
                let after = message.get(HEADER..).ok_or(Malformed::Bounds)?;
                if compression::says(after)? > LONGEST_READ {
                    return Err(Malformed::Compression);
                }
                compression::inflate(reply, after)?
            }
            Opcode::Message | Opcode::Reply => (reply, message),
        };
        if header.opcode == Opcode::Reply {
            let body = HEADER + REPLY.len()..message.len();
            bson_scan::check(message.get(body.clone()).ok_or(Malformed::Bounds)?)?;
            return Ok(Self { header, message, body, flags: 0 });
        }
        let mut scan = Scan::new(header);
        scan.advance(message.get(HEADER..).ok_or(Malformed::Bounds)?)?;
        let body = scan.body().filter(|_| scan.is_complete()).ok_or(Malformed::Bounds)?;
        Ok(Self { header, message, body, flags: scan.flags() })
    }

    pub(crate) fn document(&self) -> Result<&RawDocument, Malformed> {
        RawDocument::from_bytes(&self.message[self.body.clone()]).map_err(|_| Malformed::Bson)
    }
}

/// Replies that are read as a whole are those to hellos, to who logs in, and to what the proxy asks for itself: some hundred bytes, and some thousand in a large replica set.
pub(crate) const LONGEST_READ: usize = 1 << 20;
/// No flags; a body.
const MESSAGE: &[u8] = &[0; 5];
/// That it can wait (which every server says), no cursor, from the first on, one document.
const REPLY: &[u8] = &[8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0];
