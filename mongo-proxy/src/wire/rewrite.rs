//! Messages that are passed on with something changed in their body.

use std::{ops::Range, time::Duration};

use bson::{RawBsonRef, RawDocument, RawDocumentBuf, cstr};

use super::{
    Malformed,
    header::{HEADER, Header, Opcode},
    scan::CHECKSUM_PRESENT,
};

/// A document without some fields and with others behind them; all else as it was, to the byte.
pub(crate) fn document(body: &RawDocument, without: &[&str], with: &RawDocument) -> Result<RawDocumentBuf, Malformed> {
    let bytes = body.as_bytes();
    let mut changed = Vec::with_capacity(bytes.len() + with.as_bytes().len());
    changed.extend_from_slice(&[0; 4]);
    let mut at = 4;
    for element in body.iter_elements() {
        let element = element.map_err(|_| Malformed::Bson)?;
        // Its type, its name and a zero, its value.
        let end = at + 1 + element.key().len() + 1 + element.size();
        if !without.contains(&element.key().as_str()) {
            changed.extend_from_slice(bytes.get(at..end).ok_or(Malformed::Bson)?);
        }
        at = end;
    }
    let fields = with.as_bytes().len() - 1;
    changed.extend_from_slice(&with.as_bytes()[4..fields]);
    changed.push(0);
    let length = i32::try_from(changed.len()).map_err(|_| Malformed::Bounds)?;
    changed[..4].copy_from_slice(&length.to_le_bytes());
    RawDocumentBuf::from_bytes(changed).map_err(|_| Malformed::Bson)
}

/// The body of a command with at most so much time on the server, and with a comment if it has none.
pub(crate) fn command(
    body: &RawDocument,
    max_time: Option<Duration>,
    comment: Option<&str>,
) -> Result<RawDocumentBuf, Malformed> {
    let (mut without, mut with) = (&[][..], RawDocumentBuf::new());
    if let Some(time) = max_time {
        without = &["maxTimeMS"];
        with.append(cstr!("maxTimeMS"), i64::try_from(time.as_millis()).unwrap_or(i64::MAX));
    }
    let has_comment = || body.iter_elements().flatten().any(|field| field.key().as_str() == "comment");
    if let Some(comment) = comment.filter(|_| !has_comment()) {
        with.append(cstr!("comment"), RawBsonRef::String(comment));
    }
    document(body, without, &with)
}

/// A message up to the end of its body, which is another one now: its length is right again, and there is no checksum any more.
///
/// `message` begins with its header and holds all up to the end of its body, which is at `body`. What follows that is to be sent after it, but for the
/// checksum, whose length is given beside it.
pub(crate) fn head(message: &[u8], header: Header, body: Range<usize>, changed: &RawDocument) -> (Vec<u8>, usize) {
    let changed = changed.as_bytes();
    let before = &message[HEADER..body.start];
    let flags = before.first_chunk().map_or(0, |flags| u32::from_le_bytes(*flags));
    let checksum = if header.opcode == Opcode::Message && flags & CHECKSUM_PRESENT != 0 { 4 } else { 0 };
    let length = header.length - body.len() + changed.len() - checksum;
    let mut head = Vec::with_capacity(body.start + changed.len());
    Header { length, ..header }.write(&mut head);
    head.extend_from_slice(before);
    if checksum > 0 {
        head[HEADER..HEADER + 4].copy_from_slice(&(flags & !CHECKSUM_PRESENT).to_le_bytes());
    }
    head.extend_from_slice(changed);
    (head, checksum)
}
