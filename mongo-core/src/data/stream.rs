//! Reading in chunks: one server reply and one chunk in memory, whatever the size of the result.

use futures_util::stream::{self, BoxStream, StreamExt};
use mongodb::{
    BoxFuture, Collection, Namespace,
    bson::{self, Document, RawDocument, RawDocumentBuf},
    options::{AggregateOptions, FindOptions},
    raw_batch_cursor::{RawBatch, RawBatchCursor},
};
use serde::de::DeserializeOwned;

use crate::error::{Error, Result};

/// How large the chunks of a streamed read are.
///
/// A chunk ends at whichever bound comes first, and holds at least one document. All but the last are full.
///
/// ```
/// use mongo_core::data::ChunkSettings;
///
/// let settings = ChunkSettings::default().with_documents(500).with_bytes(1 << 20);
/// assert_eq!(settings.documents, 500);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(default))]
#[non_exhaustive]
pub struct ChunkSettings {
    /// Documents a chunk at most, 1 to 1,000,000; also how many the server is asked for at a time. Default 1,000.
    pub documents: u32,
    /// Bytes of BSON a chunk at most, at least 1; a single larger document makes a chunk of its own. Default 4 MiB.
    pub bytes: usize,
}

impl Default for ChunkSettings {
    fn default() -> Self {
        Self { documents: 1_000, bytes: 4 << 20 }
    }
}

impl ChunkSettings {
    /// Sets the number of documents a chunk at most.
    #[must_use]
    pub fn with_documents(mut self, documents: u32) -> Self {
        self.documents = documents;
        self
    }

    /// Sets the bytes of BSON a chunk at most.
    #[must_use]
    pub fn with_bytes(mut self, bytes: usize) -> Self {
        self.bytes = bytes;
        self
    }

    fn validate(&self) -> Result<()> {
        if !(1..=1_000_000).contains(&self.documents) {
            return Err(Error::invalid("a chunk must hold 1 to 1000000 documents"));
        }
        if self.bytes == 0 {
            return Err(Error::invalid("a chunk must hold at least one byte"));
        }
        Ok(())
    }
}

pub(super) fn find<T>(
    collection: Collection<RawDocumentBuf>,
    filter: Document,
    mut options: FindOptions,
    settings: ChunkSettings,
) -> BoxStream<'static, Result<Vec<T>>>
where
    T: DeserializeOwned + Send + 'static,
{
    options.batch_size = Some(settings.documents);
    let namespace = collection.namespace();
    let open = Box::pin(async move { collection.find(filter).with_options(options).batch().await });
    chunks(open, namespace, settings)
}

pub(super) fn aggregate<T>(
    collection: Collection<RawDocumentBuf>,
    pipeline: Vec<Document>,
    mut options: AggregateOptions,
    settings: ChunkSettings,
) -> BoxStream<'static, Result<Vec<T>>>
where
    T: DeserializeOwned + Send + 'static,
{
    options.batch_size = Some(settings.documents);
    let namespace = collection.namespace();
    let open = Box::pin(async move { collection.aggregate(pipeline).with_options(options).batch().await });
    chunks(open, namespace, settings)
}

/// One document of a result, as the caller's type.
pub(super) fn decode<T: DeserializeOwned>(document: &RawDocument) -> Result<T> {
    // The decoder's message quotes values ("invalid type: string \"…\""), so it is not passed on.
    bson::deserialize_from_slice(document.as_bytes())
        .map_err(|_| Error::invalid("a document does not fit the type that it is read as"))
}

type Opening = BoxFuture<'static, mongodb::error::Result<RawBatchCursor>>;

fn chunks<T>(open: Opening, namespace: Namespace, settings: ChunkSettings) -> BoxStream<'static, Result<Vec<T>>>
where
    T: DeserializeOwned + Send + 'static,
{
    let reader = Reader { source: Source::Opening(open), batch: None, position: 0, read: 0, settings };
    stream::unfold(Some(reader), move |reader| {
        let namespace = namespace.clone();
        async move {
            let mut reader = reader?;
            match reader.next_chunk().await {
                Ok(Some(chunk)) => Some((Ok(chunk), Some(reader))),
                Ok(None) => None,
                // The reader and its cursor are dropped with the first error: a cursor whose getMore was lost may have
                // advanced on the server, and the next getMore would skip what was in the lost reply.
                Err(error) => {
                    let error = error.with_context("namespace", namespace).with_context("documents read", reader.read);
                    Some((Err(error), None))
                }
            }
        }
    })
    .fuse()
    .boxed()
}

struct Reader {
    source: Source,
    /// The reply being cut into chunks, and how many of its documents have been taken.
    batch: Option<RawBatch>,
    position: usize,
    read: u64,
    settings: ChunkSettings,
}

enum Source {
    Opening(Opening),
    Open(Box<RawBatchCursor>),
}

impl Reader {
    async fn next_chunk<T: DeserializeOwned>(&mut self) -> Result<Option<Vec<T>>> {
        let mut chunk = Chunk { documents: Vec::new(), bytes: 0 };
        loop {
            if let Some(batch) = self.batch.take() {
                match self.cut(&batch, &mut chunk)? {
                    Cut::Full => {
                        self.batch = Some(batch);
                        return Ok(Some(self.hand_over(chunk)));
                    }
                    Cut::UsedUp => self.position = 0,
                    // An empty reply means that nothing is there yet: what has been gathered should not wait for more.
                    Cut::Empty if !chunk.documents.is_empty() => return Ok(Some(self.hand_over(chunk))),
                    Cut::Empty => {}
                }
                // A full chunk is not kept back for a reply that it has no room for, and that may be an error.
                if self.is_full(&chunk, 1) {
                    return Ok(Some(self.hand_over(chunk)));
                }
            }
            match self.next_batch().await? {
                Some(batch) => self.batch = Some(batch),
                None if chunk.documents.is_empty() => return Ok(None),
                None => return Ok(Some(self.hand_over(chunk))),
            }
        }
    }

    async fn next_batch(&mut self) -> Result<Option<RawBatch>> {
        self.settings.validate()?;
        if let Source::Opening(open) = &mut self.source {
            let cursor = open.await?;
            self.source = Source::Open(Box::new(cursor));
        }
        match &mut self.source {
            Source::Open(cursor) => Ok(cursor.next().await.transpose()?),
            Source::Opening(_) => Err(Error::internal("a cursor that was opened is not open")),
        }
    }

    /// Moves documents from the batch to the chunk until one of them ends.
    fn cut<T: DeserializeOwned>(&mut self, batch: &RawBatch, chunk: &mut Chunk<T>) -> Result<Cut> {
        for value in batch.doc_slices()?.into_iter().skip(self.position) {
            let document =
                value?.as_document().ok_or_else(|| Error::corrupt("a cursor returned something that is no document"))?;
            let bytes = document.as_bytes().len();
            if self.is_full(chunk, bytes) {
                return Ok(Cut::Full);
            }
            chunk.documents.push(decode(document)?);
            chunk.bytes += bytes;
            self.position += 1;
        }
        Ok(if self.position > 0 { Cut::UsedUp } else { Cut::Empty })
    }

    /// Whether a document of so many bytes has to go into another chunk.
    fn is_full<T>(&self, chunk: &Chunk<T>, bytes: usize) -> bool {
        !chunk.documents.is_empty()
            && (chunk.documents.len() >= self.settings.documents as usize
                || chunk.bytes.saturating_add(bytes) > self.settings.bytes)
    }

    fn hand_over<T>(&mut self, chunk: Chunk<T>) -> Vec<T> {
        self.read += chunk.documents.len() as u64;
        chunk.documents
    }
}

struct Chunk<T> {
    documents: Vec<T>,
    bytes: usize,
}

enum Cut {
    /// The chunk is full, and the batch has more.
    Full,
    /// The batch is used up, and the chunk may take more.
    UsedUp,
    /// The batch had nothing.
    Empty,
}

#[cfg(test)]
mod tests {
    use mongodb::bson::doc;
    use serde::Deserialize;

    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn a_document_of_another_shape_is_refused_without_quoting_it() {
        #[derive(Debug, Deserialize)]
        struct Person {
            #[expect(dead_code, reason = "only its type matters")]
            age: i32,
        }
        let document = RawDocumentBuf::try_from(&doc! { "age": "forty-two" }).unwrap();
        let error = decode::<Person>(&document).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        assert!(!error.report().contains("forty"), "{}", error.report());
    }

    #[test]
    fn settings_out_of_range_are_refused() {
        assert!(ChunkSettings::default().validate().is_ok());
        assert!(ChunkSettings::default().with_documents(0).validate().is_err());
        assert!(ChunkSettings::default().with_bytes(0).validate().is_err());
    }
}
