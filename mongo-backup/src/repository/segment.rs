//! Cutting a run of documents into segments by a keyed hash of each `_id`.
//!
//! Why by the `_id` alone: an update leaves every boundary where it is and changes one segment; an insert or a delete
//! changes one, or two if the document was itself a boundary. See `docs/format.md` for the rule in full.

use std::{fmt, hash::Hasher as _};

use mongo_core::{Error, Result, bson::RawDocument, transfer::leading_id};
use siphasher::sip::SipHasher24;

use super::config::Keys;

/// The name of a segment: a keyed BLAKE3 hash of its plain bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct SegmentId(pub(crate) [u8; 32]);

impl fmt::Debug for SegmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(&self.0[..8]))
    }
}

/// What a segment holds, which decides the key of its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    Documents,
    Node,
}

impl SegmentId {
    pub(crate) fn of(keys: &Keys, content: Content, plain: &[u8]) -> Self {
        let key = match content {
            Content::Documents => &keys.documents,
            Content::Node => &keys.nodes,
        };
        Self(*blake3::keyed_hash(key, plain).as_bytes())
    }
}

/// How long segments get, and where they end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CuttingRule {
    pub(crate) min: u32,
    pub(crate) target: u32,
    pub(crate) max: u32,
    /// One boundary in 2 to the power of this ends a segment whatever its size.
    pub(crate) anchor_bits: u8,
}

impl CuttingRule {
    pub(crate) fn new(min: u32, target: u32, max: u32, anchor_bits: u8) -> Result<Self> {
        if min == 0 || min > target || target > max || max > MAX_MAX || anchor_bits > MAX_ANCHOR_BITS {
            return Err(Error::corrupt("the repository's rule for cutting segments makes no sense"));
        }
        Ok(Self { min, target, max, anchor_bits })
    }

    /// How many low bits of a hash must be zero for a boundary, for documents of an average size: a power of two of
    /// documents that comes closest to the target from below.
    pub(crate) fn boundary_bits(self, average_document_bytes: u64) -> u8 {
        let documents = u64::from(self.target - self.min).max(1) / average_document_bytes.max(1);
        u8::try_from(documents.max(1).ilog2()).unwrap_or(0)
    }
}

/// A run of whole documents.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment<'a> {
    pub(crate) plain: &'a [u8],
    pub(crate) documents: u32,
    /// How many low bits of the hash of the last `_id` are zero.
    pub(crate) level: u8,
}

/// Cuts documents into segments as they come.
#[derive(Debug)]
pub(crate) struct Segmenter {
    rule: CuttingRule,
    bits: u8,
    hasher: BoundaryHasher,
    open: Vec<u8>,
    documents: Vec<OpenDocument>,
}

#[derive(Clone, Copy, Debug)]
struct OpenDocument {
    end: usize,
    hash: u64,
}

impl Segmenter {
    pub(crate) fn new(keys: &Keys, rule: CuttingRule, bits: u8) -> Self {
        Self { rule, bits, hasher: BoundaryHasher::new(keys), open: Vec::new(), documents: Vec::new() }
    }

    /// Another with the same rules and nothing in it.
    pub(crate) fn emptied(&self) -> Self {
        Self { open: Vec::new(), documents: Vec::new(), ..*self }
    }

    /// Adds a document and hands every segment that this completes to `emit`.
    pub(crate) fn push(&mut self, document: &[u8], hash: u64, emit: &mut impl FnMut(Segment<'_>) -> Result<()>) -> Result<()> {
        self.open.extend_from_slice(document);
        self.documents.push(OpenDocument { end: self.open.len(), hash });
        while self.open.len() > self.rule.max as usize {
            let count = self.forced_cut();
            self.cut(count, emit)?;
        }
        let large_enough = self.open.len() >= self.rule.min as usize || self.is_anchor(hash);
        if level(hash) >= self.bits && large_enough && !self.documents.is_empty() {
            return self.cut(self.documents.len(), emit);
        }
        Ok(())
    }

    /// Emits what is left.
    pub(crate) fn finish(&mut self, emit: &mut impl FnMut(Segment<'_>) -> Result<()>) -> Result<()> {
        if self.documents.is_empty() { Ok(()) } else { self.cut(self.documents.len(), emit) }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.documents.is_empty()
    }

    pub(crate) fn hasher(&self) -> BoundaryHasher {
        self.hasher
    }

    /// Whether a segment ends behind a document with this hash, whatever its size. Two readers of neighbouring ranges agree on
    /// these boundaries without having seen each other's documents.
    pub(crate) fn is_anchor(&self, hash: u64) -> bool {
        level(hash) >= self.bits.saturating_add(self.rule.anchor_bits)
    }

    /// How many documents to cut off a run that got too long: up to the one with the smallest hash between the
    /// minimum and the maximum, so that two runs that meet again also cut alike again; else as many as fit; else one.
    fn forced_cut(&self) -> usize {
        let (min, max) = (self.rule.min as usize, self.rule.max as usize);
        let fitting = self.documents.iter().take_while(|document| document.end <= max).count();
        self.documents[..fitting]
            .iter()
            .enumerate()
            .filter(|(_, document)| document.end >= min)
            .min_by_key(|(_, document)| document.hash)
            .map_or(fitting.max(1), |(position, _)| position + 1)
    }

    fn cut(&mut self, count: usize, emit: &mut impl FnMut(Segment<'_>) -> Result<()>) -> Result<()> {
        let last = self.documents[count - 1];
        let documents = u32::try_from(count).map_err(|_| Error::internal("a segment of too many documents"))?;
        emit(Segment { plain: &self.open[..last.end], documents, level: level(last.hash) })?;
        self.open.drain(..last.end);
        self.documents.drain(..count);
        for document in &mut self.documents {
            document.end -= last.end;
        }
        Ok(())
    }
}

/// The hash that decides about boundaries.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BoundaryHasher {
    key: [u8; 16],
}

impl BoundaryHasher {
    pub(crate) fn new(keys: &Keys) -> Self {
        Self { key: keys.boundaries }
    }

    /// The hash of a document's `_id`: of its BSON type and value. A document without one (only buckets of views could
    /// be) hashes as nothing.
    pub(crate) fn hash(&self, document: &RawDocument) -> u64 {
        let mut hasher = SipHasher24::new_with_key(&self.key);
        hasher.write(leading_id(document.as_bytes()).unwrap_or_default());
        hasher.finish()
    }
}

/// How many low bits of a hash are zero.
pub(crate) fn level(hash: u64) -> u8 {
    u8::try_from(hash.trailing_zeros()).unwrap_or(64)
}

/// With more than that hardly any collection would ever have an anchor.
const MAX_ANCHOR_BITS: u8 = 32;
const MAX_MAX: u32 = 16 << 20;

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use mongo_core::bson::{RawDocumentBuf, rawdoc};
    use proptest::prelude::*;

    use super::*;

    fn keys() -> Keys {
        Keys::from_secret([7; 32])
    }

    fn rule() -> CuttingRule {
        CuttingRule::new(200, 800, 3000, 3).unwrap()
    }

    fn documents(range: impl Iterator<Item = i32>, size: usize) -> Vec<RawDocumentBuf> {
        range.map(|id| rawdoc! { "_id": id, "v": "x".repeat(size) }).collect()
    }

    fn segments(documents: &[RawDocumentBuf]) -> Vec<Vec<u8>> {
        let mut segmenter = Segmenter::new(&keys(), rule(), 4);
        let mut out = Vec::new();
        let mut emit = |segment: Segment<'_>| {
            out.push(segment.plain.to_vec());
            Ok(())
        };
        for document in documents {
            let hash = segmenter.hasher().hash(document);
            segmenter.push(document.as_bytes(), hash, &mut emit).unwrap();
        }
        segmenter.finish(&mut emit).unwrap();
        out
    }

    fn differing(a: &[Vec<u8>], b: &[Vec<u8>]) -> usize {
        let known: HashSet<_> = a.iter().collect();
        b.iter().filter(|segment| !known.contains(segment)).count()
    }

    #[test]
    fn an_update_changes_one_segment() {
        let mut all = documents(0..2000, 20);
        let before = segments(&all);
        all[777] = rawdoc! { "_id": 777, "v": "something else, and longer" };
        let after = segments(&all);
        assert_eq!(before.len(), after.len());
        assert_eq!(differing(&before, &after), 1);
    }

    #[test]
    fn an_insert_or_a_delete_changes_few_segments() {
        let all = documents((0..2000).map(|id| id * 2), 20);
        let before = segments(&all);
        let mut inserted = all.clone();
        inserted.insert(700, rawdoc! { "_id": 1399, "v": "new" });
        assert!(differing(&before, &segments(&inserted)) <= 3);
        let mut deleted = all;
        deleted.remove(700);
        assert!(differing(&before, &segments(&deleted)) <= 3);
    }

    #[test]
    fn a_forced_cut_finds_back_to_the_others() {
        // No boundary at all: 40 bits never match, every cut is forced.
        let run = |documents: &[RawDocumentBuf]| {
            let mut segmenter = Segmenter::new(&keys(), rule(), 40);
            let mut out = Vec::new();
            for document in documents {
                let hash = segmenter.hasher().hash(document);
                segmenter
                    .push(document.as_bytes(), hash, &mut |segment| {
                        out.push(segment.plain.to_vec());
                        Ok(())
                    })
                    .unwrap();
            }
            out
        };
        let all = documents(0..3000, 20);
        let (whole, later) = (run(&all), run(&all[13..]));
        assert!(differing(&whole, &later) <= whole.len() / 4, "{} of {}", differing(&whole, &later), whole.len());
    }

    #[test]
    fn a_huge_document_is_a_segment_of_its_own() {
        let mut all = documents(0..3, 20);
        all.insert(1, rawdoc! { "_id": 99, "v": "y".repeat(10_000) });
        let cut = segments(&all);
        assert!(cut.iter().any(|segment| segment == all[1].as_bytes()), "{:?}", cut.iter().map(Vec::len).collect::<Vec<_>>());
    }

    proptest! {
        #[test]
        fn nothing_is_lost_and_sizes_hold(lengths in proptest::collection::vec(0_usize..400, 0..300)) {
            let all: Vec<_> = lengths.iter().zip(0_i32..).map(|(length, id)| rawdoc! { "_id": id, "v": "z".repeat(*length) }).collect();
            let cut = segments(&all);
            let joined: Vec<u8> = cut.concat();
            let expected: Vec<u8> = all.iter().flat_map(|document| document.as_bytes().to_vec()).collect();
            prop_assert_eq!(joined, expected);
            prop_assert!(cut.iter().all(|segment| segment.len() <= 3000));
        }

        #[test]
        fn the_id_of_every_type_is_found(int in any::<i64>(), text in ".{0,20}", bytes in proptest::collection::vec(any::<u8>(), 0..20)) {
            use mongo_core::bson::{Bson, Binary, spec::BinarySubtype, RawBson, doc, oid::ObjectId, Regex};
            for id in [Bson::Int64(int), Bson::String(text), Bson::Binary(Binary { subtype: BinarySubtype::Generic, bytes }),
                Bson::Null, Bson::MinKey, Bson::MaxKey, Bson::Boolean(true), Bson::ObjectId(ObjectId::new()), Bson::Double(1.5),
                Bson::Document(doc! { "a": 1 }), Bson::RegularExpression(Regex { pattern: "a".try_into().unwrap(), options: "".try_into().unwrap() })] {
                let raw = RawBson::try_from(id).unwrap();
                let with = rawdoc! { "_id": raw.clone(), "rest": 1 };
                let other = rawdoc! { "_id": raw, "rest": "different" };
                let found = leading_id(with.as_bytes()).unwrap();
                prop_assert_eq!(found, leading_id(other.as_bytes()).unwrap());
                prop_assert_eq!(4 + found.len() + 1 + 5 + 4 + 1, with.as_bytes().len());
            }
        }

        #[test]
        fn garbage_is_no_panic(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            let _ = leading_id(&bytes);
        }
    }
}
