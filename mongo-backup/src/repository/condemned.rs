//! Packs that prunes have condemned: what lets data be deleted without a lock.
//!
//! See `docs/format.md` for the protocol. In short: a backup [announces itself](super::announcement) under its snapshot's id, then
//! reads which packs are condemned, and relies on no such pack. A prune condemns packs, then notes which backups have announced themselves, and deletes
//! nothing before each of these has published its snapshot, or was revoked: a tombstone lies where its snapshot would have to be,
//! so it can never publish it. Which of the condemned packs are deleted is decided once, by an object that is never changed:
//! so a prune that wakes up late can only repeat what was decided.

use std::collections::{BTreeSet, HashSet};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use mongo_core::{
    Error, ErrorKind, Result,
    bson::{Binary, DateTime, spec::BinarySubtype},
};
use serde::{Deserialize, Serialize};

use super::{READS_AT_ONCE, Repository, announcement::Announced, manifest::SnapshotId, pack::PackId};
use crate::archive::{ObjectMeta, ObjectName, PutMode, PutOutcome};

/// What all prunes that are not through have condemned.
#[derive(Debug, Default)]
pub(crate) struct Condemned {
    pub(crate) sentences: Vec<Sentence>,
    packs: HashSet<PackId>,
    /// Those of `packs` that are in a sentence.
    pending: HashSet<PackId>,
    /// Sentences that a prune has not removed wholly.
    pub(crate) remains: Vec<SnapshotId>,
    /// Sentences that were carried out, and when it was decided.
    pub(crate) finished: Vec<(SnapshotId, DateTime)>,
    /// Objects that cannot be read, and why.
    pub(crate) damaged: Vec<(String, Error)>,
}

impl Condemned {
    /// Whether nobody may rely on a pack: it is condemned, or was deleted and can only have come back by mistake.
    pub(crate) fn holds(&self, pack: PackId) -> bool {
        self.packs.contains(&pack)
    }

    /// All packs on which nobody may rely.
    pub(crate) fn packs(&self) -> &HashSet<PackId> {
        &self.packs
    }

    /// Whether a prune will look at a pack again.
    pub(crate) fn is_pending(&self, pack: PackId) -> bool {
        self.pending.contains(&pack)
    }
}

/// The packs that one prune has condemned.
#[derive(Clone, Debug)]
pub(crate) struct Sentence {
    pub(crate) id: SnapshotId,
    pub(crate) at: DateTime,
    pub(crate) packs: Vec<PackId>,
    /// The snapshots that were there: a listing that forgets one does no harm.
    pub(crate) snapshots: Vec<SnapshotId>,
    pub(crate) seen: Option<Seen>,
    pub(crate) decision: Option<Decision>,
}

/// Which packs of a sentence are deleted. Made once, also if it is none of them, and never changed.
#[derive(Clone, Debug)]
pub(crate) struct Decision {
    pub(crate) packs: Vec<PackId>,
    pub(crate) at: DateTime,
}

/// The operations that were under way after a prune had condemned its packs.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Seen {
    /// By the clock of the prune that looked.
    pub(crate) at: DateTime,
    /// Named so when only backups announced themselves.
    #[serde(rename = "backups")]
    pub(crate) announced: Vec<Announced>,
}

/// All that lies under a sentence's name.
struct Parts {
    sentence: Option<StoredSentence>,
    seen: Option<Seen>,
    decision: Option<StoredDecision>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct StoredSentence {
    /// By the clock of the prune that condemned.
    at: DateTime,
    packs: Binary,
    snapshots: Vec<SnapshotId>,
}

#[derive(Serialize, Deserialize)]
struct StoredDecision {
    packs: Binary,
    at: DateTime,
}

impl Repository {
    /// Reads what is condemned.
    pub(crate) async fn read_condemned(&self) -> Result<Condemned> {
        let listed: Vec<ObjectMeta> = self.archive().list(CONDEMNED).try_collect().await?;
        let mut condemned = Condemned::default();
        let sentence = |object: &ObjectMeta| object.name.as_str().strip_prefix(CONDEMNED)?.split('.').next()?.parse().ok();
        let ids: BTreeSet<SnapshotId> = listed.iter().filter_map(sentence).collect();
        let read: Vec<(SnapshotId, Result<Parts>)> = stream::iter(ids)
            .map(|id| async move {
                let parts = self.read_parts(&id).await;
                (id, parts)
            })
            .buffered(READS_AT_ONCE)
            .collect()
            .await;
        for (id, parts) in read {
            let Parts { sentence, seen, decision } = match parts {
                Ok(parts) => parts,
                Err(error) if error.kind() == ErrorKind::CorruptData => {
                    condemned.damaged.push((sentence_name(&id)?.to_string(), error));
                    continue;
                }
                Err(error) => return Err(error),
            };
            let decision = match decision {
                Some(stored) => Some(Decision { packs: unpack_ids(&stored.packs)?, at: stored.at }),
                None => None,
            };
            condemned.packs.extend(decision.iter().flat_map(|decision| &decision.packs));
            match sentence {
                Some(sentence) => {
                    let packs = unpack_ids(&sentence.packs)?;
                    condemned.packs.extend(&packs);
                    condemned.pending.extend(&packs);
                    let StoredSentence { at, snapshots, .. } = sentence;
                    condemned.sentences.push(Sentence { id, at, packs, snapshots, seen, decision });
                }
                None => {
                    if seen.is_some() {
                        condemned.remains.push(id.clone());
                    }
                    condemned.finished.extend(decision.map(|decision| (id, decision.at)));
                }
            }
        }
        Ok(condemned)
    }

    async fn read_parts(&self, id: &SnapshotId) -> Result<Parts> {
        Ok(Parts {
            sentence: self.read_mark(&sentence_name(id)?).await?,
            seen: self.read_mark(&seen_name(id)?).await?,
            decision: self.read_mark(&decision_name(id)?).await?,
        })
    }

    /// Condemns packs.
    pub(crate) async fn condemn(&self, packs: &[PackId], snapshots: &[SnapshotId], now: DateTime) -> Result<SnapshotId> {
        let id = SnapshotId::generate(now)?;
        let stored = StoredSentence { at: now, packs: pack_ids(packs), snapshots: snapshots.to_vec() };
        self.put_mark(&sentence_name(&id)?, &stored, PutMode::CreateOnly).await?;
        Ok(id)
    }

    /// Notes which operations are under way, after a sentence was written. Of several that note, the first holds.
    pub(crate) async fn note_announced(&self, sentence: &SnapshotId, now: DateTime) -> Result<Seen> {
        let seen = Seen { at: now, announced: self.under_way().await?.into_iter().map(Announced::from).collect() };
        match self.put_mark(&seen_name(sentence)?, &seen, PutMode::CreateOnly).await? {
            PutOutcome::AlreadyExists => {
                let theirs = self.read_mark::<Seen>(&seen_name(sentence)?).await?;
                theirs.ok_or_else(|| Error::new(ErrorKind::Unavailable, "another prune is at work: try again later"))
            }
            PutOutcome::Stored => Ok(seen),
        }
    }

    /// Decides, once for all prunes, which packs of a sentence are deleted. Gives the decision that holds, which may be another's.
    pub(crate) async fn decide(&self, sentence: &SnapshotId, packs: Vec<PackId>, now: DateTime) -> Result<Decision> {
        let (name, stored) = (decision_name(sentence)?, StoredDecision { packs: pack_ids(&packs), at: now });
        if self.put_mark(&name, &stored, PutMode::CreateOnly).await? == PutOutcome::Stored {
            return Ok(Decision { packs, at: now });
        }
        let theirs = self.read_mark::<StoredDecision>(&name).await?;
        let theirs = theirs.ok_or_else(|| Error::new(ErrorKind::Unavailable, "another prune is at work: try again later"))?;
        Ok(Decision { packs: unpack_ids(&theirs.packs)?, at: theirs.at })
    }

    /// Whether a sentence still stands.
    pub(crate) async fn stands(&self, sentence: &SnapshotId) -> Result<bool> {
        Ok(self.read_mark::<StoredSentence>(&sentence_name(sentence)?).await?.is_some())
    }

    /// Removes a sentence that was carried out: what was not deleted stays. The decision stays too.
    pub(crate) async fn acquit(&self, sentence: &SnapshotId) -> Result<()> {
        for name in [sentence_name(sentence)?, seen_name(sentence)?] {
            self.archive().delete(&name).await?;
        }
        Ok(())
    }

    /// Removes a decision that is so old that nobody can be at carrying it out.
    pub(crate) async fn expunge(&self, sentence: &SnapshotId) -> Result<()> {
        self.archive().delete(&decision_name(sentence)?).await
    }
}

fn pack_ids(packs: &[PackId]) -> Binary {
    Binary { subtype: BinarySubtype::Generic, bytes: packs.iter().flat_map(|pack| pack.0).collect() }
}

fn unpack_ids(packed: &Binary) -> Result<Vec<PackId>> {
    let (ids, rest) = packed.bytes.as_chunks::<32>();
    if rest.is_empty() { Ok(ids.iter().map(|id| PackId(*id)).collect()) } else { Err(Error::corrupt("a mark is malformed")) }
}

fn sentence_name(id: &SnapshotId) -> Result<ObjectName> {
    ObjectName::new(format!("{CONDEMNED}{id}"))
}

fn seen_name(id: &SnapshotId) -> Result<ObjectName> {
    ObjectName::new(format!("{CONDEMNED}{id}.seen"))
}

fn decision_name(id: &SnapshotId) -> Result<ObjectName> {
    ObjectName::new(format!("{CONDEMNED}{id}.decision"))
}

/// The parser of every mark, for the fuzz target.
#[cfg(fuzzing)]
pub(crate) fn parse_any(bytes: &[u8]) {
    use mongo_core::bson;
    let _ = bson::deserialize_from_slice::<StoredSentence>(bytes).map(|stored| unpack_ids(&stored.packs));
    let _ = bson::deserialize_from_slice::<Seen>(bytes);
    let _ = bson::deserialize_from_slice::<StoredDecision>(bytes);
}

const CONDEMNED: &str = "condemned/";
