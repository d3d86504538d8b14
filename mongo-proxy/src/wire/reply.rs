//! Replies that come from here and not from a server.

use bson::RawDocument;

use super::header::{HEADER, Header, Opcode};

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

/// No flags; a body.
const MESSAGE: &[u8] = &[0; 5];
/// That it can wait (which every server says), no cursor, from the first on, one document.
const REPLY: &[u8] = &[8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0];
