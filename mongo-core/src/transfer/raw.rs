//! Small helpers over raw BSON that the rooms of `transfer` share.

use std::io::Write as _;

use mongodb::{
    Database,
    bson::{RawArray, RawDocument, RawDocumentBuf, Timestamp},
    options::SelectionCriteria,
};

use crate::error::{Error, Result};

/// Runs a command that returns a cursor and collects every document of the reply, raw.
pub(crate) async fn list(
    database: &Database,
    command: RawDocumentBuf,
    from: Option<&SelectionCriteria>,
) -> Result<Vec<RawDocumentBuf>> {
    use futures_util::TryStreamExt as _;
    let action = database.run_raw_cursor_command(command);
    let mut batches = match from {
        Some(criteria) => action.selection_criteria(criteria.clone()).batch().await?,
        None => action.batch().await?,
    };
    let mut documents = Vec::new();
    while let Some(batch) = batches.try_next().await? {
        for document in documents_in(batch.doc_slices()?)? {
            documents.push(document?.to_owned());
        }
    }
    Ok(documents)
}

/// A copy of `source` without the fields in `dropped`.
///
/// # Errors
/// `CorruptData` for a document that is malformed.
pub fn without(source: &RawDocument, dropped: &[&str]) -> Result<RawDocumentBuf> {
    let mut copy = RawDocumentBuf::new();
    for field in source {
        let (name, value) = field?;
        if !dropped.contains(&name.as_str()) {
            copy.append(name, value);
        }
    }
    Ok(copy)
}

/// A command with a long array of documents in it, written in one pass: `head`, then `array` with `documents`, then `tail`.
///
/// The general builders copy each document three times on the way into a command, which doubles the memory of a bulk write.
pub(crate) fn command_with<'a>(
    head: &RawDocument,
    array: &str,
    documents: impl Iterator<Item = &'a RawDocument> + Clone,
    tail: &RawDocument,
) -> Result<RawDocumentBuf> {
    let too_large = |_| Error::internal("a command of more than two gigabytes");
    let payload: usize = documents.clone().map(|document| document.as_bytes().len() + LONGEST_KEY).sum();
    let mut bytes = Vec::with_capacity(payload + head.as_bytes().len() + array.len() + tail.as_bytes().len() + 16);
    bytes.extend_from_slice(without_end(head));
    bytes.push(ARRAY);
    bytes.extend_from_slice(array.as_bytes());
    bytes.push(0);
    let start = bytes.len();
    bytes.extend_from_slice(&[0; 4]);
    for (position, document) in documents.enumerate() {
        bytes.push(DOCUMENT);
        write!(bytes, "{position}\0").map_err(|error| Error::internal("writing to memory failed").with_source(error))?;
        bytes.extend_from_slice(document.as_bytes());
    }
    bytes.push(0);
    let length = i32::try_from(bytes.len() - start).map_err(too_large)?;
    bytes[start..start + 4].copy_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(&without_end(tail)[4..]);
    bytes.push(0);
    let length = i32::try_from(bytes.len()).map_err(too_large)?;
    bytes[..4].copy_from_slice(&length.to_le_bytes());
    Ok(RawDocumentBuf::from_bytes(bytes)?)
}

/// Length and elements of a document, without the zero at its end.
fn without_end(document: &RawDocument) -> &[u8] {
    let bytes = document.as_bytes();
    bytes.strip_suffix(&[0]).unwrap_or(bytes)
}

pub(crate) const DOCUMENT: u8 = 0x03;
pub(crate) const ARRAY: u8 = 0x04;
pub(crate) const NULL: u8 = 0x0a;
/// The type, up to ten digits, and the zero.
const LONGEST_KEY: usize = 12;

/// One field of a document, nothing of it decoded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Element<'a> {
    pub(crate) kind: u8,
    pub(crate) name: &'a [u8],
    pub(crate) value: &'a [u8],
}

/// A document with an array of these values under a name.
pub(crate) fn array_as(name: &str, values: &[Element<'_>]) -> Result<RawDocumentBuf> {
    let mut array = vec![0; 4];
    for (position, value) in values.iter().enumerate() {
        array.push(value.kind);
        write!(array, "{position}\0").map_err(|error| Error::internal("writing to memory failed").with_source(error))?;
        array.extend_from_slice(value.value);
    }
    array.push(0);
    let length = i32::try_from(array.len()).map_err(|_| Error::internal("a list of more than two gigabytes"))?;
    array[..4].copy_from_slice(&length.to_le_bytes());
    Element { kind: ARRAY, name: b"", value: &array }.alone_as(name)
}

impl<'a> Element<'a> {
    pub(crate) fn as_str(&self) -> Option<&'a str> {
        let text = (self.kind == STRING).then(|| self.value.get(4..)?.strip_suffix(&[0])).flatten()?;
        std::str::from_utf8(text).ok()
    }

    pub(crate) fn as_document(&self) -> Option<&'a RawDocument> {
        (self.kind == DOCUMENT).then(|| RawDocument::from_bytes(self.value).ok()).flatten()
    }

    /// An array, as the document that it is: its names are numbers.
    pub(crate) fn as_array(&self) -> Option<&'a RawDocument> {
        (self.kind == ARRAY).then(|| RawDocument::from_bytes(self.value).ok()).flatten()
    }

    pub(crate) fn as_bool(&self) -> Option<bool> {
        (self.kind == BOOLEAN).then(|| self.value.first().map(|byte| *byte != 0)).flatten()
    }

    /// A whole number, of whichever type.
    pub(crate) fn as_integer(&self) -> Option<i64> {
        match self.kind {
            INT32 => self.value.first_chunk().map(|bytes| i64::from(i32::from_le_bytes(*bytes))),
            INT64 => self.value.first_chunk().map(|bytes| i64::from_le_bytes(*bytes)),
            #[expect(clippy::cast_possible_truncation, reason = "the server sends whole numbers as doubles now and then")]
            DOUBLE => {
                self.value.first_chunk().map(|bytes| f64::from_le_bytes(*bytes)).filter(|n| n.is_finite()).map(|n| n as i64)
            }
            _ => None,
        }
    }

    pub(crate) fn as_timestamp(&self) -> Option<Timestamp> {
        let bytes = (self.kind == TIMESTAMP).then(|| self.value.first_chunk::<8>()).flatten()?;
        let number = u64::from_le_bytes(*bytes);
        Some(Timestamp { time: u32::try_from(number >> 32).ok()?, increment: u32::try_from(number & 0xffff_ffff).ok()? })
    }

    /// The bytes of a UUID.
    pub(crate) fn as_uuid(&self) -> Option<[u8; 16]> {
        let is_uuid = self.kind == BINARY && self.value.get(4) == Some(&UUID);
        is_uuid.then(|| self.value.get(5..)?.try_into().ok()).flatten()
    }

    /// Whether it is a `Timestamp(0, 0)`, for which servers like to put in the time.
    pub(crate) fn is_empty_timestamp(&self) -> bool {
        self.kind == TIMESTAMP && self.value.iter().all(|byte| *byte == 0)
    }

    /// Whether the server takes it for an operator where it stands in a list: a document whose first field begins with `$`.
    pub(crate) fn is_like_operator(&self) -> bool {
        self.kind == DOCUMENT && self.value.get(5) == Some(&b'$')
    }

    /// A document with this value under another name.
    pub(crate) fn alone_as(&self, name: &str) -> Result<RawDocumentBuf> {
        let length = 4 + 1 + name.len() + 1 + self.value.len() + 1;
        let length = i32::try_from(length).map_err(|_| Error::corrupt("a value is too large"))?;
        let bytes = [&length.to_le_bytes()[..], &[self.kind], name.as_bytes(), &[0], self.value, &[0]].concat();
        Ok(RawDocumentBuf::from_bytes(bytes)?)
    }
}

/// A document or an array that is being written.
pub(crate) struct Writer(Vec<u8>);

impl Writer {
    pub(crate) fn new(capacity: usize) -> Self {
        let mut bytes = Vec::with_capacity(capacity + 16);
        bytes.extend_from_slice(&[0; 4]);
        Self(bytes)
    }

    pub(crate) fn append(&mut self, kind: u8, name: &[u8], value: &[u8]) {
        self.0.push(kind);
        self.0.extend_from_slice(name);
        self.0.push(0);
        self.0.extend_from_slice(value);
    }

    pub(crate) fn element(&mut self, element: Element<'_>) {
        self.append(element.kind, element.name, element.value);
    }

    pub(crate) fn finish(mut self) -> Result<Vec<u8>> {
        self.0.push(0);
        let length = i32::try_from(self.0.len()).map_err(|_| Error::corrupt("a document is too large"))?;
        self.0[..4].copy_from_slice(&length.to_le_bytes());
        Ok(self.0)
    }
}

/// An `_id` without its document: its type and its value.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct OwnedId(Box<[u8]>);

impl OwnedId {
    pub(crate) fn of(id: Element<'_>) -> Self {
        Self([&[id.kind], id.value].concat().into())
    }

    pub(crate) fn as_element(&self) -> Element<'_> {
        let (kind, value) = self.0.split_first().map_or((NULL, &[][..]), |(kind, value)| (*kind, value));
        Element { kind, name: b"_id", value }
    }

    pub(crate) fn to_key(&self) -> Result<super::partition::Key> {
        let id = self.as_element();
        super::partition::Key::of_element(&[&[id.kind], b"_id\0".as_slice(), id.value].concat())
    }

    /// Whether the server takes it for an operator where it stands in a list: a document whose first field begins with `$`.
    pub(crate) fn is_like_operator(&self) -> bool {
        self.as_element().is_like_operator()
    }
}

/// The fields of a document. Servers store strings and names that are no valid UTF-8 and other values that the driver's
/// readers refuse; whoever only moves documents must not stumble over them.
pub(crate) fn elements(document: &RawDocument) -> impl Iterator<Item = Result<Element<'_>>> {
    let bytes = document.as_bytes();
    let mut rest = bytes.get(4..bytes.len() - 1).unwrap_or_default();
    std::iter::from_fn(move || {
        let (kind, behind) = rest.split_first()?;
        let element = (|| {
            let end = behind.iter().position(|byte| *byte == 0)?;
            let (name, value) = (&behind[..end], &behind[end + 1..]);
            let (value, after) = value.split_at_checked(value_length(*kind, value)?)?;
            rest = after;
            Some(Element { kind: *kind, name, value })
        })();
        if element.is_none() {
            rest = &[];
        }
        Some(element.ok_or_else(|| Error::corrupt("a document is malformed")))
    })
}

/// Checks that a document is well formed down to its last field: types, lengths and ends, not the text in strings.
///
/// # Errors
/// `CorruptData` for anything that no BSON reader could walk, and for nesting deeper than any server stores.
pub fn check_structure(document: &RawDocument) -> Result<()> {
    check_to(document, 0)
}

fn check_to(document: &RawDocument, depth: usize) -> Result<()> {
    // Servers stop at 180 or 200; a damaged document must not overflow the stack here.
    if depth > DEEPEST {
        return Err(Error::corrupt("a document is nested deeper than any server allows"));
    }
    for element in elements(document) {
        let element = element?;
        match element.kind {
            0x03 | 0x04 => check_to(RawDocument::from_bytes(element.value)?, depth + 1)?,
            // Code with scope: length, string, document.
            0x0f => {
                let length = element.value.get(4..).and_then(|rest| value_length(0x02, rest));
                let scope = length.and_then(|length| element.value.get(4 + length..));
                let scope = scope.ok_or_else(|| Error::corrupt("a document is malformed"))?;
                check_to(RawDocument::from_bytes(scope)?, depth + 1)?;
            }
            _ => {}
        }
    }
    Ok(())
}

const DEEPEST: usize = 250;

/// The documents of a server's batch.
pub(crate) fn documents_in(batch: &RawArray) -> Result<impl Iterator<Item = Result<&RawDocument>>> {
    // An array is a document whose names are numbers; the driver's own iterator decodes those, which costs more than the
    // rest of the work on small documents.
    let fields = elements(RawDocument::from_bytes(batch.as_bytes())?);
    Ok(fields.map(|field| {
        let field = field?;
        if field.kind != DOCUMENT {
            return Err(Error::corrupt("the server sent something else where a document was due"));
        }
        Ok(RawDocument::from_bytes(field.value)?)
    }))
}

/// How many bytes a BSON value takes, if there are that many.
fn value_length(kind: u8, value: &[u8]) -> Option<usize> {
    let int = || usize::try_from(i32::from_le_bytes(*value.first_chunk()?)).ok();
    let string = |from: usize| value.get(from..)?.iter().position(|byte| *byte == 0);
    let length = match kind {
        0x01 | 0x09 | 0x11 | 0x12 => 8,
        0x02 | 0x0d | 0x0e => 4_usize.checked_add(int()?)?,
        0x03 | 0x04 | 0x0f => int()?,
        0x05 => 5_usize.checked_add(int()?)?,
        0x06 | 0x0a | 0x7f | 0xff => 0,
        0x07 => 12,
        0x08 => 1,
        0x0b => {
            let pattern = string(0)? + 1;
            pattern + string(pattern)? + 1
        }
        0x0c => 16_usize.checked_add(int()?)?,
        0x10 => 4,
        0x13 => 16,
        _ => return None,
    };
    (length <= value.len()).then_some(length)
}

/// The element of a leading `_id` in the bytes of a document: type, name and value as they stand there. Servers store `_id` first
/// in every document; `None` where it does not stand there.
pub fn leading_id(document: &[u8]) -> Option<&[u8]> {
    let (kind, rest) = document.get(4..)?.split_first()?;
    let length = value_length(*kind, rest.strip_prefix(b"_id\0")?)?;
    document.get(4..4 + 1 + 4 + length)
}

pub(crate) fn id_of(document: &RawDocument) -> Result<Element<'_>> {
    // Servers store `_id` first; the search covers documents from elsewhere.
    for element in elements(document) {
        let element = element?;
        if element.name == b"_id" {
            return Ok(element);
        }
    }
    Err(Error::corrupt("a document has no _id"))
}

pub(crate) const DOUBLE: u8 = 0x01;
pub(crate) const STRING: u8 = 0x02;
pub(crate) const BINARY: u8 = 0x05;
pub(crate) const BOOLEAN: u8 = 0x08;
pub(crate) const INT32: u8 = 0x10;
pub(crate) const TIMESTAMP: u8 = 0x11;
pub(crate) const OBJECT_ID: u8 = 0x07;
pub(crate) const DATE: u8 = 0x09;
pub(crate) const INT64: u8 = 0x12;
pub(crate) const DECIMAL: u8 = 0x13;
pub(crate) const SYMBOL: u8 = 0x0e;
/// The subtype of binary data.
pub(crate) const UUID: u8 = 0x04;

#[cfg(test)]
mod tests {
    use mongodb::bson::{RawArrayBuf, rawdoc};

    use super::*;

    #[test]
    fn a_command_written_in_one_pass_is_the_command_that_the_general_builder_makes() {
        let documents: Vec<RawDocumentBuf> = (0..120).map(|number| rawdoc! { "_id": number, "x": [number] }).collect();
        let mut array = RawArrayBuf::new();
        documents.iter().for_each(|document| array.push(document.clone()));
        let expected = rawdoc! { "insert": "c", "documents": array, "ordered": false, "writeConcern": { "w": 1 } };
        let documents = documents.iter().map(AsRef::as_ref);
        let tail = rawdoc! { "ordered": false, "writeConcern": { "w": 1 } };
        assert_eq!(command_with(&rawdoc! { "insert": "c" }, "documents", documents, &tail).unwrap(), expected);
    }
}
