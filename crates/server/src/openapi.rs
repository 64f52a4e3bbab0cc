//! `/openapi.json`: the native API, described from the same descriptors that serve it.

use crate::transcode::Transcoder;

pub(crate) fn document(_transcoder: &Transcoder) -> String {
    String::new()
}
