//! Applying an update of the oplog to a document ourselves: where the target has no way of its own to do it, and to new documents
//! that are not written yet.
//!
//! Three forms there are. A *replacement* is the new document. A *difference* (`$v: 2`, from 4.7 on) names what is deleted (`d`),
//! updated in place (`u`), appended (`i`), and differences of fields (`s` and the field's name); that of an array (`a: true`) its
//! new length (`l`) and what stands at which position (`u` or `s` and the position). *Modifiers* (`$v: 1`) are `$set` and `$unset`
//! of paths. Source: `document_diff_applier.cpp` and `modifier_table` of the server; the tests compare with a real one.
//!
//! Applied once more to what it has made, or to what later updates have made of that, an update does what the server's does: where a
//! difference meets a value of another type, a later update will set it, and it is left.

use mongodb::bson::{RawDocument, RawDocumentBuf};

use super::super::raw::{self, ARRAY, DOCUMENT, Element, NULL, Writer};
use crate::error::{Error, ErrorKind, Result};

/// An update of the oplog.
#[derive(Clone, Copy)]
pub(super) enum Update<'a> {
    Replacement(&'a RawDocument),
    Difference(&'a RawDocument),
    Modifiers(&'a RawDocument),
}

impl<'a> Update<'a> {
    /// Tells which form the `o` of an update has.
    pub(super) fn parse(object: &'a RawDocument) -> Result<Self> {
        let mut version = None;
        let mut difference = None;
        let mut modifiers = false;
        for (position, element) in raw::elements(object).enumerate() {
            let element = element?;
            match element.name {
                b"$v" => version = element.as_integer(),
                b"diff" if version.is_some() => difference = element.as_document(),
                b"$set" | b"$unset" => modifiers = true,
                // Behind a first field that is none of these it is a document.
                _ if position == 0 => return Ok(Self::Replacement(object)),
                _ => {}
            }
        }
        match (version, difference) {
            (Some(2), Some(difference)) => Ok(Self::Difference(difference)),
            (None | Some(1), None) if modifiers || version.is_some() => Ok(Self::Modifiers(object)),
            (None, None) => Ok(Self::Replacement(object)),
            (version, _) => Err(Error::new(ErrorKind::Unsupported, "the oplog holds an update of a form that is not known here")
                .with_context("version", version.unwrap_or(0))),
        }
    }

    /// The document that the update makes of `before`.
    pub(super) fn apply(self, before: &RawDocument) -> Result<RawDocumentBuf> {
        let bytes = match self {
            Self::Replacement(after) => return Ok(after.to_owned()),
            Self::Difference(difference) => apply_to_document(before, difference, 0)?,
            Self::Modifiers(modifiers) => return apply_modifiers(before, modifiers),
        };
        Ok(RawDocumentBuf::from_bytes(bytes)?)
    }
}

/// What a difference does to a field.
enum Change<'a> {
    Delete,
    Update(Element<'a>),
    Insert,
    Within(&'a RawDocument),
}

fn apply_to_document(before: &RawDocument, difference: &RawDocument, depth: u32) -> Result<Vec<u8>> {
    check_depth(depth)?;
    let mut changes: Vec<(&[u8], Change<'_>)> = Vec::new();
    let mut appended: Vec<Element<'_>> = Vec::new();
    for section in raw::elements(difference) {
        let section = section?;
        match section.name {
            b"d" => {
                for field in raw::elements(document(section)?) {
                    changes.push((field?.name, Change::Delete));
                }
            }
            b"u" => {
                for field in raw::elements(document(section)?) {
                    let field = field?;
                    changes.push((field.name, Change::Update(field)));
                    appended.push(field);
                }
            }
            b"i" => {
                for field in raw::elements(document(section)?) {
                    let field = field?;
                    changes.push((field.name, Change::Insert));
                    appended.push(field);
                }
            }
            [b's', field @ ..] => changes.push((field, Change::Within(document(section)?))),
            _ => return Err(unknown()),
        }
    }
    let mut after = Writer::new(before.as_bytes().len() + difference.as_bytes().len());
    for field in raw::elements(before) {
        let field = field?;
        match changes.iter().rev().find(|(name, _)| *name == field.name) {
            None => after.element(field),
            Some((_, Change::Delete | Change::Insert)) => {}
            Some((name, Change::Update(new))) => {
                after.element(*new);
                appended.retain(|other| other.name != *name);
            }
            Some((_, Change::Within(difference))) => apply_to_value(&mut after, field.name, field, difference, depth)?,
        }
    }
    appended.into_iter().for_each(|field| after.element(field));
    after.finish()
}

/// Writes the value that a difference makes of `before`.
fn apply_to_value(after: &mut Writer, name: &[u8], before: Element<'_>, difference: &RawDocument, depth: u32) -> Result<()> {
    let is_of_array = raw::elements(difference).next().transpose()?.is_some_and(|first| first.name == b"a");
    match (before.kind, is_of_array) {
        (DOCUMENT, false) => {
            let value = apply_to_document(RawDocument::from_bytes(before.value)?, difference, depth + 1)?;
            after.append(DOCUMENT, name, &value);
        }
        (ARRAY, true) => {
            let value = apply_to_array(RawDocument::from_bytes(before.value)?, difference, depth + 1)?;
            after.append(ARRAY, name, &value);
        }
        // Something later has made it another type.
        _ => after.append(before.kind, name, before.value),
    }
    Ok(())
}

fn apply_to_array(before: &RawDocument, difference: &RawDocument, depth: u32) -> Result<Vec<u8>> {
    check_depth(depth)?;
    let mut length = None;
    let mut changes: Vec<(usize, Change<'_>)> = Vec::new();
    for section in raw::elements(difference) {
        let section = section?;
        match section.name {
            b"a" => {}
            b"l" => length = Some(section.as_integer().and_then(|length| usize::try_from(length).ok()).ok_or_else(unknown)?),
            [b'u', position @ ..] => changes.push((index(position)?, Change::Update(section))),
            [b's', position @ ..] => changes.push((index(position)?, Change::Within(document(section)?))),
            _ => return Err(unknown()),
        }
    }
    let end = changes.iter().map(|(position, _)| position + 1).max().unwrap_or(0).max(length.unwrap_or(0));
    // A position of its own costs a byte at least, so no array of a server is longer.
    if end > LONGEST_ARRAY {
        return Err(Error::corrupt("an update makes an array longer than any server allows"));
    }
    let mut elements = raw::elements(before);
    let mut after = Writer::new(before.as_bytes().len() + difference.as_bytes().len());
    for position in 0.. {
        let element = if length.is_some_and(|length| position >= length) { None } else { elements.next().transpose()? };
        let change = changes.iter().find(|(at, _)| *at == position).map(|(_, change)| change);
        let name = position.to_string();
        match (element, change) {
            (None, None) if position >= end => break,
            (_, Some(Change::Update(new))) => after.append(new.kind, name.as_bytes(), new.value),
            (Some(element), Some(Change::Within(difference))) => {
                apply_to_value(&mut after, name.as_bytes(), element, difference, depth)?;
            }
            (Some(element), _) => after.append(element.kind, name.as_bytes(), element.value),
            (None, _) => after.append(NULL, name.as_bytes(), &[]),
        }
    }
    after.finish()
}

fn index(position: &[u8]) -> Result<usize> {
    std::str::from_utf8(position).ok().and_then(|position| position.parse().ok()).ok_or_else(unknown)
}

fn document<'a>(section: Element<'a>) -> Result<&'a RawDocument> {
    section.as_document().ok_or_else(unknown)
}

fn unknown() -> Error {
    Error::new(ErrorKind::Unsupported, "the oplog holds an update of a form that is not known here")
}

fn apply_modifiers(before: &RawDocument, modifiers: &RawDocument) -> Result<RawDocumentBuf> {
    let mut document = before.to_owned();
    for modifier in raw::elements(modifiers) {
        let modifier = modifier?;
        match modifier.name {
            b"$v" => {}
            b"$set" | b"$unset" => {
                for field in raw::elements(self::document(modifier)?) {
                    let field = field?;
                    let path: Vec<&[u8]> = field.name.split(|byte| *byte == b'.').collect();
                    let new = (modifier.name == b"$set").then_some(field);
                    document = RawDocumentBuf::from_bytes(set_path(&document, DOCUMENT, &path, new, 0)?)?;
                }
            }
            _ => return Err(unknown()),
        }
    }
    Ok(document)
}

/// The bytes of a document or an array in which the value at a path is another, or is not.
fn set_path(before: &RawDocument, kind: u8, path: &[&[u8]], new: Option<Element<'_>>, depth: u32) -> Result<Vec<u8>> {
    check_depth(depth)?;
    let Some((name, rest)) = path.split_first() else { return Ok(before.as_bytes().to_vec()) };
    let mut after = Writer::new(before.as_bytes().len() + new.map_or(0, |new| new.value.len()) + 16);
    let (mut found, mut count) = (false, 0_usize);
    for field in raw::elements(before) {
        let field = field?;
        count += 1;
        if field.name != *name {
            after.element(field);
            continue;
        }
        found = true;
        match (rest.is_empty(), new) {
            (true, Some(new)) => after.append(new.kind, name, new.value),
            // In an array a hole remains.
            (true, None) if kind == ARRAY => after.append(NULL, name, &[]),
            (true, None) => {}
            (false, _) if matches!(field.kind, DOCUMENT | ARRAY) => {
                let value = set_path(RawDocument::from_bytes(field.value)?, field.kind, rest, new, depth + 1)?;
                after.append(field.kind, name, &value);
            }
            (false, _) => after.element(field),
        }
    }
    if let (false, Some(new)) = (found, new) {
        if kind == ARRAY {
            let position = index(name)?;
            if position > LONGEST_ARRAY {
                return Err(Error::corrupt("an update makes an array longer than any server allows"));
            }
            for hole in count..position {
                after.append(NULL, hole.to_string().as_bytes(), &[]);
            }
        }
        let mut value = new.value.to_vec();
        let mut value_kind = new.kind;
        for name in rest.iter().rev() {
            let mut holder = Writer::new(value.len() + name.len());
            holder.append(value_kind, name, &value);
            (value, value_kind) = (holder.finish()?, DOCUMENT);
        }
        after.append(value_kind, name, &value);
    }
    after.finish()
}

fn check_depth(depth: u32) -> Result<()> {
    if depth > DEEPEST { Err(Error::corrupt("an update is nested deeper than any server allows")) } else { Ok(()) }
}

const DEEPEST: u32 = 250;
const LONGEST_ARRAY: usize = 16 << 20;

#[cfg(test)]
mod tests {
    use mongodb::bson::{RawBson, rawdoc};
    use proptest::prelude::*;

    use super::*;

    fn applied(before: &RawDocument, update: &RawDocument) -> RawDocumentBuf {
        Update::parse(update).unwrap().apply(before).unwrap()
    }

    #[test]
    fn differences_delete_update_insert_and_descend() {
        let before = rawdoc! { "_id": 1, "a": 1, "b": { "x": 1, "y": 2 }, "c": 3, "d": [1, 2, { "z": 1 }] };
        let update = rawdoc! { "$v": 2, "diff": { "d": { "c": false }, "u": { "a": 9, "new": 1 }, "i": { "last": true },
        "sb": { "u": { "y": 5 } }, "sd": { "a": true, "l": 5, "u0": "first", "s2": { "u": { "z": 2 } }, "u4": 4 } } };
        let expected = rawdoc! { "_id": 1, "a": 9, "b": { "x": 1, "y": 5 },
        "d": ["first", 2, { "z": 2 }, RawBson::Null, 4], "new": 1, "last": true };
        let once = applied(&before, &update);
        assert_eq!(once, expected);
        assert_eq!(applied(&once, &update), expected, "twice is as once");
    }

    #[test]
    fn a_difference_that_meets_another_type_leaves_it() {
        let update = rawdoc! { "$v": 2, "diff": { "sa": { "u": { "x": 1 } }, "sb": { "a": true, "u0": 1 } } };
        let later = rawdoc! { "_id": 1, "a": 5, "b": { "0": 7 } };
        assert_eq!(applied(&later, &update), later);
    }

    #[test]
    fn an_array_gets_shorter() {
        let update = rawdoc! { "$v": 2, "diff": { "sa": { "a": true, "l": 1 } } };
        assert_eq!(applied(&rawdoc! { "a": [1, 2, 3] }, &update), rawdoc! { "a": [1] });
    }

    #[test]
    fn modifiers_set_and_unset_paths() {
        let before = rawdoc! { "_id": 1, "a": { "b": 1 }, "l": [1, 2] };
        let update = rawdoc! { "$v": 1, "$set": { "a.c.d": 5, "l.3": 9, "n": 1 }, "$unset": { "a.b": true, "l.0": true } };
        let expected = rawdoc! { "_id": 1, "a": { "c": { "d": 5 } },
        "l": [RawBson::Null, 2, RawBson::Null, 9], "n": 1 };
        assert_eq!(applied(&before, &update), expected);
    }

    #[test]
    fn a_replacement_is_told_from_modifiers() {
        let document = rawdoc! { "_id": 1, "$v": 2, "diff": { "u": {} } };
        assert_eq!(applied(&rawdoc! { "_id": 1 }, &document), document);
        let unknown = rawdoc! { "$v": 3, "diff": {} };
        assert!(Update::parse(&unknown).is_err());
    }

    proptest! {
        #[test]
        fn no_changed_byte_of_an_update_is_a_panic(at in any::<prop::sample::Index>(), flip in 1..=255_u8, v1 in any::<bool>()) {
            let before = rawdoc! { "_id": 1, "a": 1, "b": { "x": 1 }, "d": [1, { "z": 1 }] };
            let update = if v1 { rawdoc! { "$v": 1, "$set": { "d.1.z": 4, "b.x": 2 }, "$unset": { "a": true } } } else {
                rawdoc! { "$v": 2, "diff": { "d": { "a": false }, "u": { "n": 1 }, "sb": { "u": { "x": 5 } },
                    "sd": { "a": true, "l": 3, "s1": { "u": { "z": 2 } }, "u2": 4 } } }
            };
            let mut bytes = update.into_bytes();
            let at = at.index(bytes.len() - 5) + 4;
            bytes[at] ^= flip;
            if let Ok(update) = RawDocument::from_bytes(&bytes) && let Ok(update) = Update::parse(update) {
                let _ = update.apply(&before);
            }
        }
    }
}
