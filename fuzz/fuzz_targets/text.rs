//! Every parser of text that people write.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mongo_core::{Namespace, NamespacePattern, NamespaceRenames, redact_uris, validate_uri};

fuzz_target!(|text: &str| {
    let _ = validate_uri(text);
    let _ = redact_uris(text);
    if let (Ok(namespace), Ok(pattern)) = (text.parse::<Namespace>(), text.parse::<NamespacePattern>()) {
        let _ = pattern.matches(&namespace.to_string());
        if let Ok(renames) = NamespaceRenames::default().renaming(text, text) {
            let _ = renames.apply(&namespace);
        }
    }
    if let Ok(id) = text.parse::<mongo_backup::SnapshotId>() {
        assert_eq!(id.as_str(), text);
    }
});
