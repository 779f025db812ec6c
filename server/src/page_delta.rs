//! Makes differences of pages for which the client sent signatures of its own versions.

use proto::delta::{AnyOffset, SIGNATURE_BYTES};
use proto::fetch::{PageContent, PageDifference, Signatures};

/// The signatures of one unit, taken in the order of its pages.
pub(crate) struct PageDifferences<'s> {
    codec: AnyOffset,
    signatures: &'s [[u8; SIGNATURE_BYTES]],
}

impl<'s> PageDifferences<'s> {
    pub(crate) fn new(signatures: Option<&'s Signatures>) -> Self {
        let seed = signatures.map_or(0, |signatures| signatures.seed);
        let pages = signatures.map_or(&[][..], |signatures| signatures.pages.as_ref());
        Self { codec: AnyOffset::new(seed), signatures: pages.as_chunks().0 }
    }

    /// The next page as it is sent. A torn page is sent whole: only replay can repair it.
    pub(crate) fn next(&mut self, content: PageContent) -> PageContent {
        let Some((signature, rest)) = self.signatures.split_first() else {
            return content;
        };
        self.signatures = rest;
        let PageContent::Present(page) = &content else {
            return content;
        };
        match self.codec.encode(signature, page.data()) {
            Some(delta) => {
                PageContent::Difference(PageDifference { hash: page.hash(), delta: delta.into() })
            }
            None => content,
        }
    }
}
