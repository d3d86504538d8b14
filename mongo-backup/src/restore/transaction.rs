//! Restoring all or nothing, in one transaction of the server.

use mongo_core::{
    Error, ErrorKind, Namespace, Result, Topology,
    bson::RawDocument,
    mongodb::{ClientSession, options::WriteConcern},
    transfer::{
        catalog::CollectionKind,
        write::{WriteMode, WriteTarget},
    },
};

use super::{DropExisting, Restore, RestoreItem, RestoreMode, RestorePlan};
use crate::repository::{documents_of, segment::Content};

/// What a restore in one transaction has done.
#[derive(Debug, Default)]
pub(super) struct Committed {
    pub(super) documents: u64,
    pub(super) bytes: u64,
    pub(super) indexes: u64,
}

/// The documents of one collection, back to back.
struct Held<'a> {
    item: &'a RestoreItem,
    documents: Vec<Vec<u8>>,
}

impl Restore {
    /// Whether a plan can be carried out in one transaction.
    ///
    /// # Errors
    /// `Unsupported` naming what cannot, with the figure where it is one of size.
    pub(super) fn check_transaction(&self, plan: &RestorePlan<'_>) -> Result<()> {
        let unfit = |what: String| Err(Error::new(ErrorKind::Unsupported, format!("all or nothing is not possible: {what}")));
        if !matches!(self.target.topology(), Topology::ReplicaSet(_)) {
            return unfit("a standalone server has no transactions; make it a replica set of one member".to_owned());
        }
        if self.settings.drop_existing == DropExisting::Yes || self.settings.mode == RestoreMode::Mirror || plan.journey.is_some()
        {
            return unfit(
                "nothing is dropped, mirrored or rolled forward in a transaction; restore under another name".to_owned(),
            );
        }
        for item in &plan.items {
            if item.source.kind() != CollectionKind::Collection || item.source.entry().is_capped() {
                return unfit(format!("the server makes no {} in a transaction: leave {} out", item.source.kind(), item.target));
            }
        }
        let (documents, bytes) = plan.total();
        if self.choice.is_everything() && bytes > self.settings.transaction_bytes {
            return unfit(format!(
                "{documents} documents have {bytes} bytes, and a transaction takes {} at most, as long as it has to fit in the server's cache",
                self.settings.transaction_bytes
            ));
        }
        Ok(())
    }

    /// Makes the collections that are not there and writes all documents, or does nothing.
    pub(super) async fn write_at_once(&self, items: &[RestoreItem]) -> Result<Committed> {
        let mut held = Vec::new();
        let mut bytes = 0;
        for item in items {
            let mut walk =
                self.repository.walk_range(&item.source.root, self.choice.ids.as_ref().filter(|_| item.source.in_id_order))?;
            let mut documents = Vec::new();
            while let Some(entry) = walk.next().await? {
                self.check_cancelled()?;
                for segment in self.repository.read_segments(Content::Documents, &[entry.id]).await? {
                    for document in documents_of(&segment) {
                        self.choose(item, document?, |document| {
                            bytes += document.as_bytes().len() as u64;
                            documents.push(document.as_bytes().to_vec());
                            Ok(())
                        })?;
                    }
                }
                if bytes > self.settings.transaction_bytes {
                    return Err(Error::new(
                        ErrorKind::Unsupported,
                        format!(
                            "all or nothing is not possible: a transaction takes {} bytes at most",
                            self.settings.transaction_bytes
                        ),
                    ));
                }
            }
            held.push(Held { item, documents });
        }
        for attempt in 1.. {
            let mut session = self.target.client().start_session().await?;
            session.start_transaction().write_concern(WriteConcern::majority()).await?;
            match self.write_all(&mut session, &held).await {
                Ok(committed) => return self.commit(session).await.map(|()| committed),
                Err(error) => {
                    // The server aborts it in any case, when the session ends.
                    let aborted = session.abort_transaction().await;
                    if !error.has_label("TransientTransactionError") || attempt == ATTEMPTS {
                        return Err(error.wrap("nothing was restored"));
                    }
                    tracing::debug!(aborted = aborted.is_ok(), "the transaction is tried again");
                }
            }
        }
        Err(Error::internal("a transaction without an end"))
    }

    async fn write_all(&self, session: &mut ClientSession, held: &[Held<'_>]) -> Result<Committed> {
        let mut committed = Committed::default();
        for Held { item, documents } in held {
            self.check_cancelled()?;
            if !self.merges(item) {
                item.source.entry().create_in(session, &self.target, &item.target).await?;
                committed.indexes += item.source.entry().secondary_indexes()?.len() as u64;
            }
            let mut target = WriteTarget::new(self.target.clone(), item.target.clone());
            target.mode = match self.settings.mode {
                RestoreMode::Upsert | RestoreMode::Replace => WriteMode::Upsert,
                _ => WriteMode::Insert,
            };
            target.bypass_validation = !self.merges(item) || self.settings.mode == RestoreMode::Replace;
            for some in documents.chunks(BATCH) {
                let some: Vec<&RawDocument> =
                    some.iter().map(|document| RawDocument::from_bytes(document)).collect::<Result<_, _>>()?;
                let outcome = target.write_in(session, &some).await?;
                if let Some(refused) = outcome.refused.first() {
                    return Err(refusal(&item.target, refused.code));
                }
                committed.documents += outcome.written;
                committed.bytes += some.iter().map(|document| document.as_bytes().len() as u64).sum::<u64>();
            }
        }
        Ok(committed)
    }

    async fn commit(&self, mut session: ClientSession) -> Result<()> {
        for attempt in 1.. {
            match session.commit_transaction().await.map_err(Error::from) {
                Ok(()) => return Ok(()),
                Err(error) if error.has_label("UnknownTransactionCommitResult") && attempt < ATTEMPTS => {}
                Err(error) if error.has_label("UnknownTransactionCommitResult") => {
                    return Err(error.wrap("it is not known whether everything was restored or nothing: look at the target"));
                }
                Err(error) => return Err(error.wrap("nothing was restored")),
            }
        }
        Err(Error::internal("a commit without an end"))
    }
}

fn refusal(namespace: &Namespace, code: i32) -> Error {
    Error::new(ErrorKind::Rejected, "the target refuses a document")
        .with_context("namespace", namespace)
        .with_context("code", code)
}

const ATTEMPTS: u32 = 5;
const BATCH: usize = 1000;
/// What one transaction may write by default.
pub(super) const TRANSACTION_BYTES: u64 = 64 << 20;
