//! Reading many small ranges of a collection at once.

use std::cmp::Ordering;

use mongodb::bson::{RawArrayBuf, RawBsonRef, RawDocumentBuf, cstr, rawdoc};

use super::{
    order::compare_ids,
    partition::{Key, KeyRange},
    raw,
    scan::ScanSource,
};
use crate::{
    error::{Error, Result},
    retry::retry,
};

impl ScanSource {
    /// Reads ranges that do not overlap, in their order; gives the documents of each, back to back.
    ///
    /// Several ranges go into one command where a filter finds the same as bounds of the index, which `by_filter` allows: not for clustered
    /// collections and not under a collation. All documents are in memory: for ranges of a few segments.
    ///
    /// # Errors
    /// As [`RangeScan::next`](super::scan::RangeScan::next).
    ///
    /// # Cancel safety
    /// Dropping the future leaves nothing behind.
    pub async fn read_ranges(&self, ranges: &[KeyRange], by_filter: bool) -> Result<Vec<Vec<u8>>> {
        let mut read = vec![Vec::new(); ranges.len()];
        let mut together = Vec::new();
        for (position, range) in ranges.iter().enumerate() {
            match range.as_filter().filter(|_| by_filter) {
                Some(filter) => together.push((position, filter)),
                None => read[position] = self.read_range(range).await?,
            }
        }
        if !together.is_empty() {
            let some = retry(&self.retry, &self.retry_budget, &self.cancel, |_| self.read_together(ranges, &together)).await?;
            for ((position, _), documents) in together.iter().zip(some) {
                read[*position] = documents;
            }
        }
        Ok(read)
    }

    async fn read_range(&self, range: &KeyRange) -> Result<Vec<u8>> {
        let mut documents = Vec::new();
        let mut scan = self.scan(range.clone());
        while let Some(batch) = scan.next().await? {
            for document in batch.documents()? {
                documents.extend_from_slice(document?.as_bytes());
            }
        }
        Ok(documents)
    }

    async fn read_together(&self, ranges: &[KeyRange], filters: &[(usize, RawDocumentBuf)]) -> Result<Vec<Vec<u8>>> {
        let mut any = RawArrayBuf::new();
        filters.iter().for_each(|(_, filter)| any.push(filter.clone()));
        let mut command = rawdoc! { "find": self.namespace.collection(), "filter": { "$or": any } };
        command.append(cstr!("hint"), rawdoc! { "_id": 1 });
        command.append(cstr!("batchSize"), BATCH_DOCUMENTS);
        let mut cursor = self.open(command).await?;
        let mut read: Vec<Vec<u8>> = filters.iter().map(|_| Vec::with_capacity(USUAL_BYTES)).collect();
        let mut at = 0;
        let mut last: Option<Key> = None;
        while let Some(batch) = cursor.next().await? {
            let mut before = last.as_ref().map(Key::as_document);
            for document in raw::documents_in(batch.doc_slices()?)? {
                let document = document?;
                // One range comes after the other, and each in the order of the index; asking for that order would make the server merge what
                // needs no merging. Should it ever be otherwise, that is an error.
                while let Some(upper) = filters.get(at).and_then(|(position, _)| ranges[*position].upper.as_ref())
                    && compare_ids(document, upper.as_document())?.is_ge()
                {
                    at += 1;
                }
                let is_behind = before.map_or(Ok(true), |before| compare_ids(before, document).map(Ordering::is_lt))?;
                match read.get_mut(at).filter(|_| is_behind) {
                    Some(documents) => documents.extend_from_slice(document.as_bytes()),
                    None => return Err(Error::internal("the server sent documents in an order that was not expected")),
                }
                before = Some(document);
            }
            last = before.map(Key::of).transpose()?;
        }
        Ok(read)
    }
}

impl KeyRange {
    /// A filter that finds what the range holds; none where it might find less, as types are told apart in a filter.
    fn as_filter(&self) -> Option<RawDocumentBuf> {
        let (lower, upper) = (self.lower.as_ref()?, self.upper.as_ref()?);
        let kind = |key: &Key| match key.as_document().get("_id") {
            Ok(Some(RawBsonRef::Int32(_) | RawBsonRef::Int64(_))) => Some(0),
            Ok(Some(RawBsonRef::String(_))) => Some(1),
            Ok(Some(RawBsonRef::ObjectId(_))) => Some(2),
            Ok(Some(RawBsonRef::DateTime(_))) => Some(3),
            Ok(Some(RawBsonRef::Binary(_))) => Some(4),
            _ => None,
        };
        if kind(lower)? != kind(upper)? {
            return None;
        }
        let mut bounds = RawDocumentBuf::new();
        bounds.append(cstr!("$gte"), lower.as_document().get("_id").ok()??);
        bounds.append(cstr!("$lt"), upper.as_document().get("_id").ok()??);
        Some(rawdoc! { "_id": bounds })
    }
}

/// What most ranges hold.
const USUAL_BYTES: usize = 20 << 10;
/// A reply holds 16 MiB at most.
const BATCH_DOCUMENTS: i32 = 100_000;
