//! Files in GridFS: whole or streamed, with metadata.

use std::io;

use futures_util::stream::TryStreamExt;
use mongodb::{
    bson::{Bson, Document, doc},
    error::{Error as DriverError, ErrorKind as DriverKind, GridFsErrorKind},
    gridfs::{FilesCollectionDocument, GridFsBucket, GridFsDownloadStream, GridFsUploadStream},
    options::GridFsUploadOptions,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt, FuturesAsyncWriteCompatExt};

use super::sealed;
use crate::error::{Error, ErrorKind, Result};

/// Bytes moved at a time. The driver copies what it has buffered with every read and write, so small pieces make large
/// files slow; eight of its default chunks are cheap.
const PIECE_BYTES: usize = 8 * 255 * 1024;

/// How a file is put into GridFS.
///
/// ```
/// use mongo_core::bson::doc;
/// use mongo_core::data::PutSettings;
///
/// let settings = PutSettings::default().with_metadata(doc! { "content_type": "image/png" });
/// assert!(settings.metadata.is_some());
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(default))]
#[non_exhaustive]
pub struct PutSettings {
    /// The file's `_id`. Default: a new ObjectId.
    pub id: Option<Bson>,
    /// Stored beside the file, for the host's own use. Default: none.
    pub metadata: Option<Document>,
    /// Bytes a GridFS chunk, 1 to 15 MiB. Default: that of the bucket, which is 255 KiB.
    pub chunk_bytes: Option<u32>,
}

impl PutSettings {
    /// Sets the file's `_id`.
    #[must_use]
    pub fn with_id(mut self, id: impl Into<Bson>) -> Self {
        self.id = Some(id.into());
        self
    }

    /// Sets what is stored beside the file.
    #[must_use]
    pub fn with_metadata(mut self, metadata: Document) -> Self {
        self.metadata = Some(metadata);
        self
    }

    /// Sets the bytes a GridFS chunk.
    #[must_use]
    pub fn with_chunk_bytes(mut self, bytes: u32) -> Self {
        self.chunk_bytes = Some(bytes);
        self
    }
}

/// A file that has been put into GridFS.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct StoredFile {
    /// The file's `_id`: what [`GridFsExt::get_file`] asks for.
    pub id: Bson,
    /// Its length in bytes.
    pub bytes: u64,
}

/// Files in and out of a driver's [`GridFsBucket`], through tokio's traits.
///
/// A bucket comes from [`Database::gridfs_bucket`](mongodb::Database::gridfs_bucket). A file may have a name that
/// others have too: names are revisions, ids are unique. The trait is implemented for `GridFsBucket` and is not meant to
/// be implemented elsewhere. Privileges: `find` to read and `insert`, `remove` and `createIndex` to write, on both of the
/// bucket's collections (role `readWrite`).
///
/// # Examples
/// ```no_run
/// # async fn example(database: mongo_core::mongodb::Database) -> mongo_core::Result<()> {
/// use mongo_core::bson::doc;
/// use mongo_core::data::{GridFsExt, PutSettings};
///
/// let bucket = database.gridfs_bucket(None);
/// let settings = PutSettings::default().with_metadata(doc! { "content_type": "text/plain" });
/// let file = bucket.put_file("hello.txt", b"hello", settings).await?;
/// assert_eq!(bucket.get_file(file.id.clone()).await?, b"hello");
/// bucket.delete_file(file.id).await?;
/// # Ok(()) }
/// ```
pub trait GridFsExt: sealed::Sealed {
    /// Stores `bytes` as a new file.
    ///
    /// The file exists when the future resolves, and not before: its chunks come first, its entry last.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] when the id that was asked for is taken, [`ErrorKind::InvalidInput`] for a chunk size out of
    /// range. On any error what was written is removed again.
    ///
    /// # Cancel safety
    /// Dropping the future removes in the background what was written.
    fn put_file(&self, name: &str, bytes: &[u8], settings: PutSettings) -> impl Future<Output = Result<StoredFile>> + Send;

    /// Stores what `reader` yields as a new file, in the memory of a few chunks.
    ///
    /// # Errors
    /// As [`put_file`](Self::put_file); an error of the reader is [`ErrorKind::InvalidInput`] with the I/O error as its
    /// source, and removes what was written.
    ///
    /// # Cancel safety
    /// As [`put_file`](Self::put_file); the reader has then been read up to an unknown point.
    ///
    /// # Examples
    /// ```no_run
    /// # async fn example(bucket: mongo_core::mongodb::gridfs::GridFsBucket) -> Result<(), Box<dyn std::error::Error>> {
    /// use mongo_core::data::{GridFsExt, PutSettings};
    ///
    /// let film = tokio::fs::File::open("film.mkv").await?;
    /// let stored = bucket.put_file_from("film.mkv", film, PutSettings::default()).await?;
    /// println!("{} bytes", stored.bytes);
    /// # Ok(()) }
    /// ```
    fn put_file_from<R>(&self, name: &str, reader: R, settings: PutSettings) -> impl Future<Output = Result<StoredFile>> + Send
    where
        R: AsyncRead + Unpin + Send;

    /// The whole file with this id, in memory.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when there is none, [`ErrorKind::CorruptData`] when chunks are missing or of the wrong size.
    ///
    /// # Cancel safety
    /// Reads only: dropping the future is safe.
    fn get_file(&self, id: impl Into<Bson> + Send) -> impl Future<Output = Result<Vec<u8>>> + Send;

    /// The newest file with this name, in memory.
    ///
    /// # Errors
    /// As [`get_file`](Self::get_file).
    ///
    /// # Cancel safety
    /// Reads only: dropping the future is safe.
    fn get_file_by_name(&self, name: &str) -> impl Future<Output = Result<Vec<u8>>> + Send;

    /// Writes the file with this id to `writer`, flushes it, and returns the number of bytes.
    ///
    /// Memory is one server reply (16 MiB at most), however long the file is.
    ///
    /// # Errors
    /// As [`get_file`](Self::get_file); an error of the writer is [`ErrorKind::InvalidInput`] with the I/O error as
    /// its source. What was written until then stays written.
    ///
    /// # Cancel safety
    /// Dropping the future leaves part of the file in the writer.
    fn get_file_to<W>(&self, id: impl Into<Bson> + Send, writer: W) -> impl Future<Output = Result<u64>> + Send
    where
        W: AsyncWrite + Unpin + Send;

    /// What is known of the file with this id: name, length, time, metadata.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when there is none.
    ///
    /// # Cancel safety
    /// Reads only: dropping the future is safe.
    fn file_info(&self, id: impl Into<Bson> + Send) -> impl Future<Output = Result<FilesCollectionDocument>> + Send;

    /// All files with this name, newest first. No such file is an empty vector.
    ///
    /// # Errors
    /// As the server and the network fail.
    ///
    /// # Cancel safety
    /// Reads only: dropping the future is safe.
    fn files_named(&self, name: &str) -> impl Future<Output = Result<Vec<FilesCollectionDocument>>> + Send;

    /// Deletes the file with this id: its entry first, then its chunks.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when there is none; chunks without an entry are removed even so.
    ///
    /// # Cancel safety
    /// A dropped future can leave chunks without an entry, which no one sees. Deleting the same id again removes them.
    fn delete_file(&self, id: impl Into<Bson> + Send) -> impl Future<Output = Result<()>> + Send;
}

impl GridFsExt for GridFsBucket {
    async fn put_file(&self, name: &str, bytes: &[u8], settings: PutSettings) -> Result<StoredFile> {
        let mut upload = begin(self, name, settings).await?;
        for piece in bytes.chunks(PIECE_BYTES) {
            upload.write_all(piece).await.map_err(io_error)?;
        }
        complete(upload, bytes.len() as u64).await
    }

    async fn put_file_from<R>(&self, name: &str, mut reader: R, settings: PutSettings) -> Result<StoredFile>
    where
        R: AsyncRead + Unpin + Send,
    {
        let mut upload = begin(self, name, settings).await?;
        let mut piece = vec![0; PIECE_BYTES];
        let mut bytes = 0;
        loop {
            let filled = match fill(&mut reader, &mut piece).await {
                Ok(filled) => filled,
                Err(error) => {
                    let error = Error::invalid("the source of the file could not be read").with_source(error);
                    return Err(match upload.get_mut().abort().await {
                        Ok(()) => error,
                        Err(left) => error.with_context("chunks were left behind", Error::from(left)),
                    });
                }
            };
            if filled.is_empty() {
                return complete(upload, bytes).await;
            }
            // A failed write has already removed what was written before it.
            upload.write_all(filled).await.map_err(io_error)?;
            bytes += filled.len() as u64;
        }
    }

    async fn get_file(&self, id: impl Into<Bson> + Send) -> Result<Vec<u8>> {
        collect(self.open_download_stream(id.into()).await.map_err(driver_error)?).await
    }

    async fn get_file_by_name(&self, name: &str) -> Result<Vec<u8>> {
        collect(self.open_download_stream_by_name(name).await.map_err(driver_error)?).await
    }

    async fn get_file_to<W>(&self, id: impl Into<Bson> + Send, mut writer: W) -> Result<u64>
    where
        W: AsyncWrite + Unpin + Send,
    {
        let download = self.open_download_stream(id.into()).await.map_err(driver_error)?;
        let written = pour(download, &mut writer).await?;
        writer.flush().await.map_err(write_error)?;
        Ok(written)
    }

    async fn file_info(&self, id: impl Into<Bson> + Send) -> Result<FilesCollectionDocument> {
        self.find_one(by_id(id.into())).await?.ok_or_else(|| Error::new(ErrorKind::NotFound, "GridFS has no file with this id"))
    }

    async fn files_named(&self, name: &str) -> Result<Vec<FilesCollectionDocument>> {
        let files = self.find(doc! { "filename": name }).sort(doc! { "uploadDate": -1, "_id": -1 }).await?;
        Ok(files.try_collect().await?)
    }

    async fn delete_file(&self, id: impl Into<Bson> + Send) -> Result<()> {
        self.delete(id.into()).await.map_err(driver_error)
    }
}

async fn begin(bucket: &GridFsBucket, name: &str, settings: PutSettings) -> Result<Compat<GridFsUploadStream>> {
    if settings.chunk_bytes.is_some_and(|bytes| !(1..=15 << 20).contains(&bytes)) {
        return Err(Error::invalid("a GridFS chunk must be 1 byte to 15 MiB: it is stored in one document"));
    }
    let mut options = GridFsUploadOptions::default();
    options.chunk_size_bytes = settings.chunk_bytes;
    options.metadata = settings.metadata;
    let mut upload = bucket.open_upload_stream(name).with_options(options);
    if let Some(id) = settings.id {
        // When the driver's last insert meets an id that exists, it removes all chunks with that id: those of the file
        // that was there before. So the id is looked up first.
        if bucket.find_one(by_id(id.clone())).await?.is_some() {
            return Err(Error::new(ErrorKind::Conflict, "GridFS has a file with this id already"));
        }
        upload = upload.id(id);
    }
    Ok(upload.await?.compat_write())
}

async fn complete(mut upload: Compat<GridFsUploadStream>, bytes: u64) -> Result<StoredFile> {
    let id = upload.get_ref().id().clone();
    upload.shutdown().await.map_err(io_error)?;
    Ok(StoredFile { id, bytes })
}

/// `$eq`, so that an id that is a document is not taken for operators.
fn by_id(id: Bson) -> Document {
    doc! { "_id": { "$eq": id } }
}

/// Reads until the piece is full or the reader has no more.
async fn fill<'a>(reader: &mut (impl AsyncRead + Unpin + Send), piece: &'a mut [u8]) -> io::Result<&'a [u8]> {
    let mut filled = 0;
    while let Some(rest) = piece.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match reader.read(rest).await? {
            0 => break,
            read => filled += read,
        }
    }
    Ok(piece.get(..filled).unwrap_or_default())
}

async fn collect(download: GridFsDownloadStream) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    pour(download, &mut bytes).await?;
    Ok(bytes)
}

async fn pour(download: GridFsDownloadStream, writer: &mut (impl AsyncWrite + Unpin + Send)) -> Result<u64> {
    let mut download = download.compat();
    let mut piece = vec![0; PIECE_BYTES];
    let mut written = 0;
    loop {
        let read = download.read(&mut piece).await.map_err(io_error)?;
        let Some(read) = piece.get(..read).filter(|read| !read.is_empty()) else { return Ok(written) };
        writer.write_all(read).await.map_err(write_error)?;
        written += read.len() as u64;
    }
}

fn write_error(error: io::Error) -> Error {
    Error::invalid("the destination of the file could not be written").with_source(error)
}

/// The driver passes its errors through the I/O traits in a box.
fn io_error(error: io::Error) -> Error {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<DriverError>()) {
        Some(driver) => driver_error(driver.clone()),
        None => Error::internal("GridFS failed with an error that is not the driver's").with_source(error),
    }
}

fn driver_error(error: DriverError) -> Error {
    let DriverKind::GridFs(kind) = &*error.kind else { return error.into() };
    match kind {
        GridFsErrorKind::FileNotFound { .. } | GridFsErrorKind::RevisionNotFound { .. } => {
            Error::new(ErrorKind::NotFound, "GridFS has no such file")
        }
        GridFsErrorKind::MissingChunk { n, .. } => Error::corrupt("a chunk of the file is missing").with_context("chunk", n),
        GridFsErrorKind::WrongSizeChunk { n, actual_size, expected_size, .. } => {
            Error::corrupt("a chunk of the file has the wrong size")
                .with_context("chunk", n)
                .with_context("bytes", actual_size)
                .with_context("expected", expected_size)
        }
        GridFsErrorKind::WrongNumberOfChunks { actual_number, expected_number, .. } => {
            Error::corrupt("the file has the wrong number of chunks")
                .with_context("chunks", actual_number)
                .with_context("expected", expected_number)
        }
        GridFsErrorKind::AbortError { original_error, delete_error, .. } => {
            let cause = original_error.as_ref().unwrap_or(delete_error).clone();
            Error::from(cause).wrap("the upload failed, and its chunks could not be removed")
        }
        _ => error.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn pieces_are_filled_from_short_reads() {
        let mut reader =
            tokio_util::io::StreamReader::new(futures_util::stream::iter([&b"ab"[..], b"cde", b"f"].map(io::Result::Ok)));
        let mut piece = [0; 4];
        assert_eq!(fill(&mut reader, &mut piece).await.unwrap(), b"abcd");
        assert_eq!(fill(&mut reader, &mut piece).await.unwrap(), b"ef");
        assert_eq!(fill(&mut reader, &mut piece).await.unwrap(), b"");
    }

    #[test]
    fn errors_of_the_driver_come_through_the_io_traits() {
        let inner = DriverError::from(io::Error::from(io::ErrorKind::ConnectionReset));
        assert_eq!(io_error(io::Error::other(inner)).kind(), ErrorKind::Unavailable);
        assert_eq!(io_error(io::Error::other("x")).kind(), ErrorKind::Internal);
    }
}
