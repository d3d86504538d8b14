//! Finding out what an interrupted write has written.

use std::collections::HashMap;

use futures_util::TryStreamExt as _;
use mongodb::bson::{RawDocument, cstr, rawdoc};

use super::{
    majority::OpTime,
    raw::{self, Element, leading_id},
    write::{Statement, WriteOutcome, WriteTarget},
};
use crate::error::{Error, Result};

impl WriteTarget {
    /// Which of the documents the collection holds already, byte for byte as they are given here.
    ///
    /// For whoever writes a batch again that was interrupted: an insert refuses what is there, and this tells whether that is the same
    /// document. Where the server puts the time in place of a `Timestamp(0, 0)`, the interruption may have left one so; it is put right if that is
    /// asked for, and is the same then. Needs the action `find`.
    ///
    /// # Errors
    /// The server's own.
    ///
    /// # Cancel safety
    /// Dropping the future leaves nothing that was not there before.
    pub async fn find_written(&self, documents: &[&RawDocument], half_written: Marred) -> Result<FoundWritten> {
        let mut written = vec![false; documents.len()];
        let mut marred = Vec::new();
        let mut lookup = Lookup::default();
        for (index, document) in documents.iter().enumerate() {
            let id = raw::id_of(document)?;
            // The server takes such a value in a list for an operator.
            if id.is_like_operator() {
                let alone = Lookup { bytes: 0, wanted: vec![(index, id)] };
                self.look_up(alone, documents, &mut written, &mut marred).await?;
                continue;
            }
            lookup.bytes += id.value.len();
            lookup.wanted.push((index, id));
            if lookup.wanted.len() == IDS_AT_ONCE || lookup.bytes >= BYTES_AT_ONCE {
                self.look_up(std::mem::take(&mut lookup), documents, &mut written, &mut marred).await?;
            }
        }
        self.look_up(lookup, documents, &mut written, &mut marred).await?;
        let mut op_time = None;
        if half_written == Marred::PutRight && !self.keeps_empty_timestamps && !marred.is_empty() {
            let marred: Vec<(usize, &RawDocument)> =
                marred.into_iter().filter_map(|index| Some((index, *documents.get(index)?))).collect();
            let mut corrected = WriteOutcome::default();
            self.write_split(&marred, Statement::Correct, &mut corrected, None).await?;
            op_time = corrected.op_time;
            for (index, _) in marred {
                written[index] = !corrected.refused.iter().any(|refused| refused.index == index);
            }
        }
        Ok(FoundWritten { there: written, op_time })
    }

    async fn look_up(
        &self,
        lookup: Lookup<'_>,
        documents: &[&RawDocument],
        written: &mut [bool],
        marred: &mut Vec<usize>,
    ) -> Result<()> {
        let filter = match lookup.wanted.as_slice() {
            [] => return Ok(()),
            [(_, only)] => rawdoc! { "_id": only.alone_as("$eq")? },
            many => {
                let ids: Vec<_> = many.iter().map(|(_, id)| *id).collect();
                rawdoc! { "_id": raw::array_as("$in", &ids)? }
            }
        };
        // Type and value: numbers that are equal are one `_id`, and still not the same bytes.
        let mut positions: HashMap<&[u8], usize> =
            lookup.wanted.iter().filter_map(|(index, _)| Some((leading_id(documents[*index].as_bytes())?, *index))).collect();
        let mut command = rawdoc! { "find": self.namespace.collection() };
        command.append(cstr!("filter"), filter);
        let database = self.deployment.database(self.namespace.database());
        let failed = |error: mongodb::error::Error| Error::from(error).with_context("namespace", &self.namespace);
        let mut batches = database.run_raw_cursor_command(command).batch().await.map_err(failed)?;
        while let Some(batch) = batches.try_next().await.map_err(failed)? {
            for found in raw::documents_in(batch.doc_slices()?)? {
                let found = found?;
                let Some(index) = leading_id(found.as_bytes()).and_then(|id| positions.remove(id)) else { continue };
                let given = documents[index];
                if found.as_bytes() == given.as_bytes() {
                    written[index] = true;
                } else if is_marred(found, given)? {
                    marred.push(index);
                }
            }
        }
        Ok(())
    }
}

/// What to do with documents that an interruption has left half written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Marred {
    /// Leave them: they count as others.
    Leave,
    /// Write them as they should be.
    PutRight,
}

/// What was found of documents that may be there already.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct FoundWritten {
    /// For each of the documents whether it is there.
    pub there: Vec<bool>,
    /// Where in the oplog the last of those came to stand that were put right, if any was.
    pub op_time: Option<OpTime>,
}

/// Documents to look for.
#[derive(Default)]
struct Lookup<'a> {
    wanted: Vec<(usize, Element<'a>)>,
    bytes: usize,
}

/// Whether all that is wrong is that timestamps were put in place of empty ones.
fn is_marred(found: &RawDocument, given: &RawDocument) -> Result<bool> {
    if found.as_bytes().len() != given.as_bytes().len() {
        return Ok(false);
    }
    for (found, given) in raw::elements(found).zip(raw::elements(given)) {
        let (found, given) = (found?, given?);
        let is_replaced = given.is_empty_timestamp() && given.name != b"_id";
        if (found.kind, found.name) != (given.kind, given.name) || (found.value != given.value && !is_replaced) {
            return Ok(false);
        }
    }
    Ok(true)
}

const IDS_AT_ONCE: usize = 1000;
const BYTES_AT_ONCE: usize = 4 << 20;
