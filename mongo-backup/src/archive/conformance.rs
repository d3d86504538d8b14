//! What every [`ArchiveSink`] must do, as checks that any implementation can run.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use futures_util::{TryStreamExt as _, future};
use mongo_core::{Error, ErrorKind, Result};

use super::{ArchiveSink, ObjectName, PutMode, PutOutcome};

/// Runs every check against an archive that is empty and used by nobody else.
///
/// # Errors
/// The first promise of [`ArchiveSink`] that is broken, or the archive's own error.
pub async fn check(archive: Arc<dyn ArchiveSink>) -> Result<()> {
    expect(listed(&*archive, "").await?.is_empty(), "a new archive is empty")?;
    missing_objects(&*archive).await?;
    put_and_get(&*archive).await?;
    create_only(&*archive).await?;
    listing(&*archive).await?;
    one_winner(&archive).await?;
    deleting(&*archive).await?;
    expect(!archive.describe().is_empty(), "an archive can be named")
}

async fn missing_objects(archive: &dyn ArchiveSink) -> Result<()> {
    let name = ObjectName::new("no/such/object")?;
    expect_kind(archive.get(&name, None).await, ErrorKind::NotFound, "reading a missing object")?;
    expect_kind(archive.get(&name, Some(0..1)).await, ErrorKind::NotFound, "reading a range of a missing object")?;
    expect_kind(archive.head(&name).await, ErrorKind::NotFound, "the head of a missing object")?;
    archive.delete(&name).await?;
    expect(listed(archive, "no/").await?.is_empty(), "a missing prefix lists nothing")
}

async fn put_and_get(archive: &dyn ArchiveSink) -> Result<()> {
    for (name, size) in [("sizes/empty", 0_usize), ("sizes/one", 1), ("sizes/large", 20 << 20)] {
        let name = ObjectName::new(name)?;
        let bytes: Bytes = (0..size).map(|position| u8::try_from(position % 251).unwrap_or(0)).collect::<Vec<_>>().into();
        expect(archive.put(&name, bytes.clone(), PutMode::CreateOnly).await? == PutOutcome::Stored, "a new object is stored")?;
        expect(archive.get(&name, None).await? == bytes, "an object reads as it was written")?;
        expect(archive.head(&name).await?.size == size as u64, "the head tells the size")?;
        expect(archive.get(&name, Some(0..0)).await?.is_empty(), "an empty range is empty")?;
        expect_kind(archive.get(&name, Some(0..size as u64 + 1)).await, ErrorKind::CorruptData, "a range past the end")?;
        if size > 1000 {
            expect(archive.get(&name, Some(777..1000)).await? == bytes.slice(777..1000), "a range reads its bytes")?;
        }
    }
    Ok(())
}

async fn create_only(archive: &dyn ArchiveSink) -> Result<()> {
    let name = ObjectName::new("once")?;
    let (first, second) = (Bytes::from_static(b"first"), Bytes::from_static(b"second"));
    archive.put(&name, first.clone(), PutMode::CreateOnly).await?;
    let again = archive.put(&name, second.clone(), PutMode::CreateOnly).await?;
    expect(again == PutOutcome::AlreadyExists, "a taken name is told")?;
    expect(archive.get(&name, None).await? == first, "create-only changes nothing")?;
    expect(archive.put(&name, second.clone(), PutMode::Replace).await? == PutOutcome::Stored, "replacing is told")?;
    expect(archive.get(&name, None).await? == second, "replacing replaces")
}

async fn listing(archive: &dyn ArchiveSink) -> Result<()> {
    let mut names: Vec<String> = (0..50).map(|number| format!("list/{:02x}/object-{number}", number % 7)).collect();
    for name in &names {
        archive.put(&ObjectName::new(name.clone())?, Bytes::from_static(b"abc"), PutMode::CreateOnly).await?;
    }
    names.sort();
    let found = listed(archive, "list/").await?;
    expect(found.keys().cloned().collect::<Vec<_>>() == names, "a prefix lists exactly its objects")?;
    expect(found.values().all(|size| *size == 3), "a listing tells the sizes")?;
    let inner = listed(archive, "list/03/").await?;
    expect(inner.keys().all(|name| name.starts_with("list/03/")) && inner.len() == 7, "a deeper prefix lists its own")
}

async fn one_winner(archive: &Arc<dyn ArchiveSink>) -> Result<()> {
    let name = ObjectName::new("race")?;
    let attempts = (0..16_u8).map(|number| {
        let (archive, name) = (Arc::clone(archive), name.clone());
        async move { archive.put(&name, Bytes::from(vec![number; 1000]), PutMode::CreateOnly).await }
    });
    let outcomes = future::try_join_all(attempts).await?;
    let winners: Vec<_> = outcomes.iter().enumerate().filter(|(_, outcome)| **outcome == PutOutcome::Stored).collect();
    expect(winners.len() == 1, "exactly one of many creates")?;
    let object = archive.get(&name, None).await?;
    expect(
        winners.iter().all(|(number, _)| object.iter().all(|byte| usize::from(*byte) == *number)),
        "the winner's bytes are the object's",
    )
}

async fn deleting(archive: &dyn ArchiveSink) -> Result<()> {
    let name = ObjectName::new("once")?;
    archive.delete(&name).await?;
    archive.delete(&name).await?;
    expect_kind(archive.get(&name, None).await, ErrorKind::NotFound, "reading a deleted object")?;
    expect(!listed(archive, "").await?.contains_key("once"), "a deleted object is not listed")?;
    expect(archive.put(&name, Bytes::new(), PutMode::CreateOnly).await? == PutOutcome::Stored, "a deleted name is free")
}

async fn listed(archive: &dyn ArchiveSink, prefix: &str) -> Result<BTreeMap<String, u64>> {
    archive.list(prefix).map_ok(|meta| (meta.name.as_str().to_owned(), meta.size)).try_collect().await
}

fn expect(holds: bool, promise: &'static str) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::internal(format!("the archive breaks a promise: {promise}"))) }
}

fn expect_kind<T>(result: Result<T>, kind: ErrorKind, what: &'static str) -> Result<()> {
    match result {
        Err(error) if error.kind() == kind => Ok(()),
        Err(error) => Err(error.wrap(format!("{what} fails with another kind than {kind:?}"))),
        Ok(_) => Err(Error::internal(format!("{what} succeeds"))),
    }
}
