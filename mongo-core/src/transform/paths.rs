//! Rewriting the values at some paths of a document, through arrays, and hashing them.

use bson::{RawDocument, RawDocumentBuf};

use crate::{
    error::{Error, Result},
    transfer::{
        exact_number,
        raw::{self, ARRAY, BINARY, DECIMAL, DOCUMENT, DOUBLE, Element, INT32, INT64, NULL, OBJECT_ID, STRING, UUID, Writer},
    },
};

/// A path and what to do with the values there.
pub(super) type Rewrite<'a, T> = (&'a [Vec<u8>], T);

/// The names of a path.
pub(super) fn path_of(field: &str) -> Result<Vec<Vec<u8>>> {
    let path: Vec<Vec<u8>> = field.split('.').map(|name| name.as_bytes().to_vec()).collect();
    if path.iter().any(Vec::is_empty) || field.contains('\0') {
        return Err(
            Error::invalid("a field is a name, or names with dots between them").with_context("field", field.escape_debug())
        );
    }
    Ok(path)
}

/// A document in which `write` has written the values at the paths. Of several paths that meet a field the first counts.
pub(super) fn rewrite<T: Copy>(
    document: &RawDocument,
    rules: &[Rewrite<'_, T>],
    write: &mut dyn FnMut(&mut Writer, Element<'_>, T) -> Result<()>,
) -> Result<RawDocumentBuf> {
    Ok(RawDocumentBuf::from_bytes(rewritten(document, rules, write, 0)?)?)
}

fn rewritten<T: Copy>(
    document: &RawDocument,
    rules: &[Rewrite<'_, T>],
    write: &mut dyn FnMut(&mut Writer, Element<'_>, T) -> Result<()>,
    depth: u32,
) -> Result<Vec<u8>> {
    if depth > DEEPEST {
        return Err(Error::corrupt("a document is nested deeper than any server allows"));
    }
    let mut to = Writer::new(document.as_bytes().len());
    for field in raw::elements(document) {
        let field = field?;
        let meeting: Vec<Rewrite<'_, T>> = rules.iter().filter_map(|rule| below(*rule, field.name)).collect();
        match meeting.iter().find(|(rest, _)| rest.is_empty()) {
            Some((_, rule)) => write(&mut to, field, *rule)?,
            None if meeting.is_empty() => to.element(field),
            None => descend(&mut to, field, &meeting, write, depth)?,
        }
    }
    to.finish()
}

/// What is left of a rule below a field; none if its path does not go there.
fn below<'a, T>((path, rule): Rewrite<'a, T>, field: &[u8]) -> Option<Rewrite<'a, T>> {
    path.split_first().filter(|(first, _)| *first == field).map(|(_, rest)| (rest, rule))
}

/// Goes on below a field, through arrays.
fn descend<T: Copy>(
    to: &mut Writer,
    field: Element<'_>,
    rules: &[Rewrite<'_, T>],
    write: &mut dyn FnMut(&mut Writer, Element<'_>, T) -> Result<()>,
    depth: u32,
) -> Result<()> {
    if depth > DEEPEST {
        return Err(Error::corrupt("a document is nested deeper than any server allows"));
    }
    match (field.as_document(), field.as_array()) {
        (Some(document), _) => to.append(DOCUMENT, field.name, &rewritten(document, rules, write, depth + 1)?),
        (None, Some(array)) => {
            let mut elements = Writer::new(array.as_bytes().len());
            for element in raw::elements(array) {
                descend(&mut elements, element?, rules, write, depth + 1)?;
            }
            to.append(ARRAY, field.name, &elements.finish()?);
        }
        (None, None) => to.element(field),
    }
    Ok(())
}

/// Writes a keyed hash in place of a value: of the same type where that has room for one.
pub(super) fn hash(key: &[u8; 32], salt: &[u8], to: &mut Writer, value: Element<'_>) {
    let mut hasher = blake3::Hasher::new_keyed(key);
    hasher.update(&(salt.len() as u64).to_le_bytes());
    hasher.update(salt);
    match value.kind {
        // That there is nothing tells nothing, and numbers that are equal are one value whatever their types.
        NULL => return to.element(value),
        INT32 | INT64 | DOUBLE | DECIMAL => {
            hasher.update(&[INT64]);
            hasher.update(&exact_number(&value));
        }
        _ => {
            hasher.update(&[value.kind]);
            hasher.update(value.value);
        }
    }
    let hash = hasher.finalize();
    let bytes = hash.as_bytes();
    match value.kind {
        OBJECT_ID => to.append(OBJECT_ID, value.name, &bytes[..12]),
        INT32 | INT64 | DOUBLE | DECIMAL => to.append(INT64, value.name, &bytes[..8]),
        BINARY if value.as_uuid().is_some() => {
            to.append(BINARY, value.name, &[&16_i32.to_le_bytes()[..], &[UUID], &bytes[..16]].concat());
        }
        _ => to.append(STRING, value.name, &text(&hash.to_hex()[..32])),
    }
}

/// A text as BSON has it.
pub(super) fn text(text: &str) -> Vec<u8> {
    let length = u32::try_from(text.len() + 1).unwrap_or(u32::MAX);
    [&length.to_le_bytes()[..], text.as_bytes(), &[0]].concat()
}

pub(super) const DEEPEST: u32 = 250;
