//! Opening a repository, making one, and its keys.

use std::sync::{Arc, RwLock, atomic::AtomicU64};

use futures_util::{StreamExt as _, TryStreamExt as _};
use mongo_core::{Error, ErrorKind, Result, lock};

use super::{
    Inner, Repository,
    config::{self, Config, StoredConfig},
    envelope::{self, Magic},
    key::{Key, KeyId, KeyInfo, KeyRecord},
    segment::CuttingRule,
};
use crate::{
    archive::{ArchiveSink, ObjectName, PutMode, PutOutcome},
    audit::AuditAction,
};

impl Repository {
    /// Opens the repository in an archive.
    ///
    /// # Errors
    /// `NotFound` when the archive holds none, `Unauthorized` for a wrong key or none where one is needed, `InvalidInput` for
    /// a key where there is no encryption, `CorruptData` naming the damaged object, `Unsupported` for a newer format, or the archive's own.
    pub async fn open(archive: impl ArchiveSink, key: Key) -> Result<Self> {
        Self::open_shared(Arc::new(archive), key).await
    }

    /// As [`open`](Self::open), on an archive that others use too.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub async fn open_shared(archive: Arc<dyn ArchiveSink>, key: Key) -> Result<Self> {
        key.check()?;
        let Some(stored) = read_config(&*archive).await? else {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!(
                    "there is no backup repository in {}: check the path, or make one with the first backup",
                    archive.describe()
                ),
            ));
        };
        let (config, opened_with) = unlock(&*archive, stored, &key).await?;
        let repository = Self::with_config(archive, config, None, opened_with);
        repository.reload_index().await?;
        Ok(repository)
    }

    /// Opens the repository in an archive, or prepares a new one in an empty archive, encrypted if a key is given.
    ///
    /// Nothing is written yet: the first backup makes the repository when it begins to write.
    ///
    /// # Errors
    /// As [`open`](Self::open), and `Conflict` when the archive holds something else.
    pub async fn open_or_init(archive: impl ArchiveSink, key: Key) -> Result<Self> {
        Self::open_or_init_shared(Arc::new(archive), key).await
    }

    /// As [`open_or_init`](Self::open_or_init), on an archive that others use too.
    ///
    /// # Errors
    /// As [`open_or_init`](Self::open_or_init).
    pub async fn open_or_init_shared(archive: Arc<dyn ArchiveSink>, key: Key) -> Result<Self> {
        if read_config(&*archive).await?.is_some() {
            return Self::open_shared(archive, key).await;
        }
        key.check()?;
        let mut objects = archive.list("");
        while let Some(object) = objects.next().await {
            // A key without a config was left by somebody who was interrupted while making a repository.
            if !object?.name.as_str().starts_with(KEYS) {
                return Err(Error::new(
                    ErrorKind::Conflict,
                    format!("{} is not empty and is no backup repository: choose an empty one", archive.describe()),
                ));
            }
        }
        let cutting = CuttingRule::new(SEGMENT_MIN, SEGMENT_TARGET, SEGMENT_MAX, ANCHOR_BITS)?;
        let prepared = Config::generate(cutting, PACK_BYTES, !key.is_unencrypted())?;
        Ok(Self::with_config(archive, prepared, Some(key), None))
    }

    fn with_config(archive: Arc<dyn ArchiveSink>, config: Config, unmade: Option<Key>, opened_with: Option<KeyId>) -> Self {
        let inner = Inner {
            archive,
            config: RwLock::new(Arc::new(config)),
            unmade: tokio::sync::Mutex::new(unmade),
            opened_with: RwLock::new(opened_with),
            index: RwLock::default(),
            readings: AtomicU64::new(1),
        };
        Self(Arc::new(inner), None)
    }

    /// Whether the repository is not in the archive yet.
    pub(super) async fn is_unmade(&self) -> bool {
        self.0.unmade.lock().await.is_some()
    }

    /// Writes key and config if the repository is new.
    pub(crate) async fn make(&self) -> Result<()> {
        let mut unmade = self.0.unmade.lock().await;
        let Some(key) = unmade.as_ref() else { return Ok(()) };
        let name = config_name()?;
        let object = self.config().to_object(&name)?;
        // The key first: a config that no key opens would be of no use to anybody.
        let id = if key.is_unencrypted() { None } else { Some(self.put_key(key, "first", config::sum(&object)).await?) };
        let opened_with = if self.archive().put(&name, object, PutMode::CreateOnly).await? == PutOutcome::AlreadyExists {
            // Somebody else made it in the meantime, or an earlier attempt of our own took effect: what lies there holds.
            let theirs =
                read_config(&**self.archive()).await?.ok_or_else(|| Error::internal("the config exists and does not"))?;
            let (config, opened_with) = unlock(&**self.archive(), theirs, key).await?;
            *lock::write(&self.0.config) = Arc::new(config);
            if let Some(id) = id.filter(|id| opened_with.as_ref() != Some(id)) {
                self.archive().delete(&key_name(&id)?).await?;
            }
            opened_with
        } else {
            // What an interrupted attempt has left opens another secret: it must not be taken for a key of this repository.
            for (other, _) in read_keys(&**self.archive()).await? {
                if id.as_ref() != Some(&other) {
                    self.archive().delete(&key_name(&other)?).await?;
                }
            }
            id
        };
        *lock::write(&self.0.opened_with) = opened_with;
        *unmade = None;
        self.reload_index().await
    }

    /// Whether what it stores is encrypted.
    pub fn is_encrypted(&self) -> bool {
        self.config().cipher.is_some()
    }

    /// The keys that open the repository, oldest first. Empty for one that is not encrypted.
    ///
    /// # Errors
    /// `CorruptData` for a damaged key, naming its object; the archive's own.
    pub async fn keys(&self) -> Result<Vec<KeyInfo>> {
        let in_use = lock::read(&self.0.opened_with).clone();
        let mut keys = Vec::new();
        for (id, record) in read_keys(&**self.archive()).await? {
            let record = record?;
            keys.push(KeyInfo {
                in_use: in_use.as_ref() == Some(&id),
                kind: record.kind(),
                label: record.label.clone(),
                created: record.created,
                id,
            });
        }
        keys.sort_by(|a, b| a.created.cmp(&b.created).then_with(|| a.id.cmp(&b.id)));
        Ok(keys)
    }

    /// Adds a key that opens the repository too. No stored data is rewritten.
    ///
    /// # Errors
    /// `InvalidInput` if the repository is not encrypted or `key` is none; the archive's own.
    pub async fn add_key(&self, key: &Key, label: &str) -> Result<KeyId> {
        let work = self.add_key_unrecorded(key, label);
        self.recorded(AuditAction::Keys, [("change", "add_key".to_owned())], work, |_| None).await
    }

    async fn add_key_unrecorded(&self, key: &Key, label: &str) -> Result<KeyId> {
        if !self.is_encrypted() {
            return Err(Error::invalid("the repository is not encrypted: begin a new one with a key"));
        }
        key.check()?;
        self.make().await?;
        let config = self.config();
        let sum = match config.read_from {
            Some(sum) => sum,
            None => config::sum(&config.to_object(&config_name()?)?),
        };
        self.put_key(key, label, sum).await
    }

    /// Removes a key: from now on it opens nothing.
    ///
    /// Whoever had the key and kept a copy of its object in the archive can still read what lies there. If a key has become known to
    /// strangers who could read the archive, begin a new repository.
    ///
    /// # Errors
    /// `NotFound` if there is no such key, `Conflict` for the last one; the archive's own.
    pub async fn remove_key(&self, id: &KeyId) -> Result<()> {
        let work = self.remove_key_unrecorded(id);
        self.recorded(AuditAction::Keys, [("change", "remove_key".to_owned())], work, |_| None).await
    }

    async fn remove_key_unrecorded(&self, id: &KeyId) -> Result<()> {
        let keys = self.keys().await?;
        if !keys.iter().any(|key| key.id == *id) {
            return Err(
                Error::new(ErrorKind::NotFound, "there is no such key: list the keys to see theirs").with_context("key", id)
            );
        }
        if keys.iter().any(|key| key.id == *id && key.in_use) && keys.len() > 1 {
            return Err(Error::new(
                ErrorKind::Conflict,
                "the repository was opened with this key: open it with another to remove it, or rotate it",
            )
            .with_context("key", id));
        }
        if keys.len() == 1 {
            return Err(Error::new(
                ErrorKind::Conflict,
                "this is the last key, nothing would open the repository any more: add another first",
            )
            .with_context("key", id));
        }
        self.archive().delete(&key_name(id)?).await
    }

    /// Adds a key and removes the one with which the repository was opened. No stored data is rewritten.
    ///
    /// # Errors
    /// Those of [`add_key`](Self::add_key) and [`remove_key`](Self::remove_key); if removing fails, both keys open the repository.
    pub async fn rotate_key(&self, key: &Key, label: &str) -> Result<KeyId> {
        let work = self.rotate_key_unrecorded(key, label);
        self.recorded(AuditAction::Keys, [("change", "rotate_key".to_owned())], work, |_| None).await
    }

    async fn rotate_key_unrecorded(&self, key: &Key, label: &str) -> Result<KeyId> {
        let added = self.add_key_unrecorded(key, label).await?;
        let before = lock::write(&self.0.opened_with).replace(added.clone());
        if let Some(before) = before {
            self.archive().delete(&key_name(&before)?).await?;
        }
        Ok(added)
    }

    async fn put_key(&self, key: &Key, label: &str, config_sum: [u8; 32]) -> Result<KeyId> {
        let (config, key, label) = (self.config(), key.clone(), label.to_owned());
        let record =
            tokio::task::spawn_blocking(move || KeyRecord::wrap(&key, &label, &config.keys.secret, &config_sum)).await??;
        let id = KeyId::generate()?;
        let name = key_name(&id)?;
        let object = envelope::seal(Magic::KEY, Some(&name), None, &record.to_bytes()?)?;
        match self.archive().put(&name, object.clone(), PutMode::CreateOnly).await? {
            // A store that lost the answer to the first attempt finds the object that this attempt has put.
            PutOutcome::AlreadyExists if self.archive().get(&name, None).await? != object => {
                Err(Error::internal("a key of this random name exists"))
            }
            _ => Ok(id),
        }
    }
}

async fn read_config(archive: &dyn ArchiveSink) -> Result<Option<(StoredConfig, [u8; 32])>> {
    let name = config_name()?;
    let object = match archive.get(&name, None).await {
        Ok(object) => object,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let stored = StoredConfig::from_bytes(&envelope::open(Magic::CONFIG, &name, None, &object)?);
    stored.map(|stored| Some((stored, config::sum(&object)))).map_err(|error| error.with_context("object", &name))
}

/// The config with its secret, and the key that opened it.
async fn unlock(
    archive: &dyn ArchiveSink,
    (stored, sum): (StoredConfig, [u8; 32]),
    key: &Key,
) -> Result<(Config, Option<KeyId>)> {
    if !stored.is_encrypted() {
        if !key.is_unencrypted() {
            // Not ignored: somebody may have put a config of their own there to be told what is to be kept from them.
            return Err(Error::invalid(format!(
                "the repository in {} is not encrypted, but a key was given: leave the key out, or begin a new repository with it",
                archive.describe()
            )));
        }
        let secret = stored.plain_secret()?;
        return Ok((stored.unlock(secret)?, None));
    }
    if key.is_unencrypted() {
        return Err(Error::new(
            ErrorKind::Unauthorized,
            format!("the repository in {} is encrypted: give its passphrase or host key", archive.describe()),
        ));
    }
    let (mut damaged, mut foreign, mut tried) = (None, 0, 0_usize);
    for (id, record) in read_keys(archive).await? {
        let record = match record {
            Ok(record) => record,
            Err(error) => {
                damaged = Some(error);
                continue;
            }
        };
        tried += 1;
        let key = key.clone();
        match tokio::task::spawn_blocking(move || record.unwrap(&key)).await? {
            Ok(Some(opened)) if opened.config_sum == sum => {
                let mut config = stored.unlock(*opened.secret)?;
                config.read_from = Some(sum);
                return Ok((config, Some(id)));
            }
            Ok(Some(_)) => foreign += 1,
            Ok(None) => {}
            Err(error) if error.kind() == ErrorKind::CorruptData => damaged = Some(error),
            Err(error) => return Err(error),
        }
    }
    if foreign > 0 {
        return Err(Error::corrupt(
            "the repository's config is not the one that the key was made for: it was exchanged or damaged, put the original back",
        )
        .with_context("object", config_name()?));
    }
    match damaged {
        Some(error) => Err(error.wrap("the key opens none of the repository's keys that can be read, and some cannot be read")),
        None if tried == 0 => Err(Error::corrupt("the repository has lost its keys: put the objects in keys/ back")),
        None => {
            Err(Error::new(ErrorKind::Unauthorized, "the passphrase or host key opens none of the repository's keys: check it")
                .with_context("keys", tried))
        }
    }
}

async fn read_keys(archive: &dyn ArchiveSink) -> Result<Vec<(KeyId, Result<KeyRecord>)>> {
    let mut keys = Vec::new();
    let mut objects = archive.list(KEYS);
    while let Some(object) = objects.try_next().await? {
        let Some(Ok(id)) = object.name.as_str().strip_prefix(KEYS).map(str::parse::<KeyId>) else { continue };
        let record = match archive.get(&object.name, None).await {
            Ok(bytes) => envelope::open(Magic::KEY, &object.name, None, &bytes)
                .and_then(|payload| KeyRecord::from_bytes(&payload).map_err(|error| error.with_context("object", &object.name))),
            // Removed since it was listed.
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        keys.push((id, record));
    }
    Ok(keys)
}

fn config_name() -> Result<ObjectName> {
    ObjectName::new("config")
}

fn key_name(id: &KeyId) -> Result<ObjectName> {
    ObjectName::new(format!("{KEYS}{id}"))
}

const KEYS: &str = "keys/";
const SEGMENT_MIN: u32 = 10 << 10;
const SEGMENT_TARGET: u32 = 14 << 10;
const SEGMENT_MAX: u32 = 64 << 10;
const ANCHOR_BITS: u8 = 4;
const PACK_BYTES: u32 = 16 << 20;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{archive::MemoryArchive, repository::key::KeyKind};

    fn host(byte: u8) -> Key {
        Key::host([byte; 32])
    }

    async fn made(key: &Key) -> (Arc<MemoryArchive>, Repository) {
        let archive = Arc::new(MemoryArchive::new());
        let repository = Repository::open_or_init_shared(Arc::<MemoryArchive>::clone(&archive), key.clone()).await.unwrap();
        repository.make().await.unwrap();
        (archive, repository)
    }

    async fn kind_of_opening(archive: &Arc<MemoryArchive>, key: Key) -> Option<ErrorKind> {
        Repository::open_shared(Arc::<MemoryArchive>::clone(archive), key).await.err().map(|error| error.kind())
    }

    #[tokio::test]
    async fn only_its_keys_open_a_repository() {
        let (archive, repository) = made(&Key::passphrase("first")).await;
        let added = repository.add_key(&host(1), "host").await.unwrap();
        assert_eq!(kind_of_opening(&archive, Key::passphrase("first")).await, None);
        assert_eq!(kind_of_opening(&archive, host(1)).await, None);
        assert_eq!(kind_of_opening(&archive, host(2)).await, Some(ErrorKind::Unauthorized));
        assert_eq!(kind_of_opening(&archive, Key::passphrase("other")).await, Some(ErrorKind::Unauthorized));
        assert_eq!(kind_of_opening(&archive, Key::unencrypted()).await, Some(ErrorKind::Unauthorized));
        assert_eq!(kind_of_opening(&archive, Key::passphrase("")).await, Some(ErrorKind::InvalidInput));
        repository.remove_key(&added).await.unwrap();
        assert_eq!(kind_of_opening(&archive, host(1)).await, Some(ErrorKind::Unauthorized));
        let keys = repository.keys().await.unwrap();
        assert_eq!(keys.iter().map(|key| (key.kind, key.in_use)).collect::<Vec<_>>(), [(KeyKind::Passphrase, true)]);
        let last = repository.remove_key(&keys[0].id).await.unwrap_err();
        assert_eq!(last.kind(), ErrorKind::Conflict);
    }

    #[tokio::test]
    async fn a_config_with_fields_of_a_later_version_is_opened_by_the_keys_that_are_added_and_rotated() {
        let (archive, repository) = made(&host(1)).await;
        let name = config_name().unwrap();
        let object = archive.get(&name, None).await.unwrap();
        let payload = envelope::open(Magic::CONFIG, &name, None, &object).unwrap();
        let mut later: mongo_core::bson::Document = mongo_core::bson::deserialize_from_slice(&payload).unwrap();
        later.insert("somethingNew", 1);
        let payload = mongo_core::bson::serialize_to_vec(&later).unwrap();
        let object = envelope::seal(Magic::CONFIG, Some(&name), None, &payload).unwrap();
        repository.put_key(&host(2), "of the later version", config::sum(&object)).await.unwrap();
        archive.put(&name, object, PutMode::Replace).await.unwrap();

        let opened = Repository::open_shared(Arc::<MemoryArchive>::clone(&archive), host(2)).await.unwrap();
        opened.add_key(&host(3), "added").await.unwrap();
        opened.rotate_key(&host(4), "rotated").await.unwrap();
        for byte in [3, 4] {
            assert_eq!(kind_of_opening(&archive, host(byte)).await, None, "{byte}");
        }
    }

    #[tokio::test]
    async fn rotating_replaces_the_key_that_is_in_use() {
        let (archive, _) = made(&host(1)).await;
        let repository = Repository::open_shared(Arc::<MemoryArchive>::clone(&archive), host(1)).await.unwrap();
        repository.rotate_key(&host(2), "second").await.unwrap();
        assert_eq!(kind_of_opening(&archive, host(1)).await, Some(ErrorKind::Unauthorized));
        assert_eq!(kind_of_opening(&archive, host(2)).await, None);
        repository.rotate_key(&host(3), "third").await.unwrap();
        assert_eq!(repository.keys().await.unwrap().len(), 1);
    }

    #[tokio::test]
    async fn an_exchanged_config_is_named() {
        let (archive, _) = made(&host(1)).await;
        let (other, _) = made(&host(1)).await;
        let config = config_name().unwrap();
        let theirs = other.get(&config, None).await.unwrap();
        archive.put(&config, theirs, PutMode::Replace).await.unwrap();
        let error = Repository::open_shared(archive, host(1)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::CorruptData);
        assert!(error.report().contains("config"), "{}", error.report());
    }

    #[tokio::test]
    async fn a_key_is_not_wasted_on_a_config_without_encryption() {
        let (archive, _) = made(&Key::unencrypted()).await;
        assert_eq!(kind_of_opening(&archive, host(1)).await, Some(ErrorKind::InvalidInput));
        assert_eq!(kind_of_opening(&archive, Key::unencrypted()).await, None);
    }

    #[tokio::test]
    async fn lost_and_damaged_keys_are_named() {
        let (archive, repository) = made(&host(1)).await;
        let name = key_name(&repository.keys().await.unwrap()[0].id).unwrap();
        let mut bytes = archive.get(&name, None).await.unwrap().to_vec();
        bytes[40] ^= 1;
        archive.put(&name, bytes.into(), PutMode::Replace).await.unwrap();
        let error = Repository::open_shared(Arc::<MemoryArchive>::clone(&archive), host(1)).await.unwrap_err();
        assert!(error.kind() == ErrorKind::CorruptData && error.report().contains(name.as_str()), "{}", error.report());
        archive.delete(&name).await.unwrap();
        assert_eq!(kind_of_opening(&archive, host(1)).await, Some(ErrorKind::CorruptData));
    }

    #[tokio::test]
    async fn of_two_that_make_a_repository_at_once_both_use_the_same() {
        let archive = Arc::new(MemoryArchive::new());
        let open = || Repository::open_or_init_shared(Arc::<MemoryArchive>::clone(&archive), host(1));
        let (first, second) = (open().await.unwrap(), open().await.unwrap());
        let (a, b) = tokio::join!(first.make(), second.make());
        a.and(b).unwrap();
        assert_eq!(first.config().keys.secret, second.config().keys.secret);
        assert_eq!(first.keys().await.unwrap().len(), 1);
    }
}
