//! Making collections that exist what the snapshot has: documents that it does not have are deleted.

use std::sync::Arc;

use mongo_core::{
    Error, ErrorKind, Result,
    bson::{Document, RawArrayBuf, RawDocumentBuf, cstr, rawdoc},
    progress::{PhaseMeter, Total},
    transfer::{catalog::Catalog, compare::Finding, partition::Key},
};

use super::{Restore, RestoreItem, RestoreMode};
use crate::live::compare_with_live;

impl Restore {
    /// Deletes the documents of merged collections that the snapshot does not have. Gives how many.
    pub(super) async fn delete_extras(&self, items: &[&RestoreItem]) -> Result<u64> {
        let merged = |item: &&&RestoreItem| self.merges(item);
        if self.settings.mode != RestoreMode::Mirror {
            return Ok(0);
        }
        let meter = PhaseMeter::start(Arc::clone(&self.progress), "mirror", Total::Unknown);
        let mut deleted = 0;
        for item in items.iter().filter(merged) {
            self.check_cancelled()?;
            let selection = mongo_core::NamespaceSelection::all().including(&format!("{}.*", item.target.database()))?;
            let catalog = Catalog::read(&self.target, &selection, None).await?;
            let Some(live) = catalog.get(&item.target) else { continue };
            let mut extras: Vec<Key> = Vec::new();
            let mut note = |finding, key: &Key| {
                if finding == Finding::OnlyRight {
                    extras.push(key.clone());
                }
            };
            compare_with_live(&self.repository, &item.source, &self.target, live, &self.cancel, &meter, &mut note).await?;
            for batch in extras.chunks(DELETES_AT_ONCE) {
                self.check_cancelled()?;
                deleted += self.delete(item, batch).await?;
            }
        }
        meter.finish();
        Ok(deleted)
    }

    async fn delete(&self, item: &RestoreItem, keys: &[Key]) -> Result<u64> {
        let mut deletes = RawArrayBuf::new();
        for key in keys {
            let mut equal = RawDocumentBuf::new();
            let id = key
                .to_bson()
                .ok_or_else(|| Error::corrupt("the target has an _id that cannot be read, and so not be deleted"))?;
            equal.append(cstr!("$eq"), id);
            deletes.push(rawdoc! { "q": { "_id": equal }, "limit": 1 });
        }
        let mut command = rawdoc! { "delete": item.target.collection(), "ordered": false };
        command.append(cstr!("deletes"), deletes);
        let concern = mongo_core::bson::serialize_to_vec(&self.write_concern)?;
        let concern = RawDocumentBuf::from_bytes(concern)?;
        if !concern.is_empty() {
            command.append(cstr!("writeConcern"), concern);
        }
        let reply: Document = self.target.database(item.target.database()).run_raw_command(command).await?;
        // Errors of single deletes and of the write concern come in a reply that says ok.
        if reply.contains_key("writeErrors") || reply.contains_key("writeConcernError") {
            return Err(Error::new(
                ErrorKind::Unavailable,
                "the target did not delete what the snapshot does not have: run it again",
            )
            .with_context("namespace", &item.target));
        }
        reply
            .get_i32("n")
            .ok()
            .and_then(|n| u64::try_from(n).ok())
            .ok_or_else(|| Error::internal("the server did not say how many documents it deleted"))
    }
}

const DELETES_AT_ONCE: usize = 1000;
