//! Gives objects that are uploaded in parts their check values: taken of each part as it is sent, and put beside the completion of the
//! upload, which ends once both are stored.
//!
//! So they are there before anything refers to the object, and nobody waits for them longer than for the completion itself. Whether that
//! succeeded is in its answer's body: those of another owner's object are replaced only then.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use aws_sdk_s3::Client;
use aws_sdk_s3::config::interceptors::BeforeSerializationInterceptorContextMut;
use aws_sdk_s3::config::{ConfigBag, Intercept, RuntimeComponents};
use aws_sdk_s3::error::BoxError;
use aws_sdk_s3::operation::create_multipart_upload::CreateMultipartUploadInput;
use aws_smithy_runtime_api::client::http::{
    HttpClient, HttpConnector, HttpConnectorFuture, HttpConnectorSettings, SharedHttpClient,
    SharedHttpConnector,
};
use aws_smithy_runtime_api::client::orchestrator::HttpRequest;
use aws_smithy_runtime_api::client::result::ConnectorError;
use parking_lot::Mutex;

use super::upload::{has_parameter, is_completed, pieces};
use super::window_checksums::{CheckValues, NAME_METADATA_KEY, last_part, path_of};
use crate::base::store_error::{StoreError, StoreErrorKind};
use crate::store::Store;
use crate::store::frames::Frames;
use crate::store::sums::{Sums, WRITE_KEY};

const NOT_IN_MEMORY: &str = "only bodies that are in memory can be sent";

/// Takes the check values of the uploads of one container's owner. Clones are the same.
#[derive(Debug, Clone)]
pub(crate) struct SumsWriter(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// Where the values are put.
    store: Store,
    /// The uploads under way, by name of the object.
    uploads: Mutex<HashMap<String, Upload>>,
}

/// An upload under way.
#[derive(Debug)]
struct Upload {
    write: String,
    /// Values and length of each part.
    parts: BTreeMap<u32, (CheckValues, u64)>,
}

impl SumsWriter {
    /// For the container in this store.
    pub(crate) fn new(store: Store) -> Self {
        Self(Arc::new(Shared {
            store,
            uploads: Mutex::default(),
        }))
    }

    /// A client whose uploads in parts get check values: as `client` otherwise.
    pub(crate) fn client(&self, client: &Client) -> Client {
        let config = client.config();
        let builder = config.to_builder().interceptor(self.clone());
        let builder = match config.http_client() {
            Some(inner) => builder.http_client(Writing {
                inner,
                writer: self.clone(),
            }),
            None => builder,
        };
        Client::from_conf(builder.build())
    }

    fn begin(&self, name: &str, write: String) {
        let parts = BTreeMap::new();
        self.0
            .uploads
            .lock()
            .insert(name.to_owned(), Upload { write, parts });
    }

    fn take_part(&self, name: &str, number: u32, bytes: &Frames) {
        let values = CheckValues::of(bytes);
        if let Some(upload) = self.0.uploads.lock().get_mut(name) {
            upload.parts.insert(number, (values, bytes.len() as u64));
        }
    }

    /// The values of an upload whose parts are all there. None of one that was not begun here.
    fn sums(&self, name: &str) -> Option<Sums> {
        let uploads = self.0.uploads.lock();
        let upload = uploads.get(name)?;
        let numbered = upload.parts.keys().copied().eq(1..=upload.parts.len() as u32);
        let parts = upload.parts.values().map(|(values, len)| (values, *len));
        let (values, object_bytes) = CheckValues::joined(parts).filter(|_| numbered)?;
        Some(Sums {
            write: upload.write.clone(),
            object_bytes,
            values,
        })
    }

    /// Puts the values of an object whose upload is being completed, unless others are there: `false` then. Those may be of an
    /// object that another owner has stored under this name, and the answer to the completion tells.
    async fn put_new(&self, name: String) -> Result<bool, StoreError> {
        let Some(sums) = self.sums(&name) else {
            log::debug!("the object {name} gets no check values: it was not uploaded as the others are");
            return Ok(true);
        };
        match self.0.store.put_new_sums(&name, &sums).await {
            Err(e) if e.kind == StoreErrorKind::PreconditionFailed => Ok(false),
            // Nothing that is published depends on them.
            Err(e) if e.kind == StoreErrorKind::AccessDenied => {
                log::warn!("the object {name} has no check values: {e}");
                Ok(true)
            }
            put => put.map(|()| true),
        }
    }

    /// Puts the values of an object whose upload was completed, whatever is there.
    async fn replace(&self, name: &str) -> Result<(), StoreError> {
        match self.sums(name) {
            Some(sums) => self.0.store.put_sums(name, &sums).await,
            None => Ok(()),
        }
    }

    fn forget(&self, name: &str) {
        self.0.uploads.lock().remove(name);
    }
}

impl Intercept for SumsWriter {
    fn name(&self) -> &'static str {
        "SumsWriter"
    }

    /// An upload is begun: its metadata say which object it is, and have its writer's mark.
    fn modify_before_serialization(
        &self,
        context: &mut BeforeSerializationInterceptorContextMut<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let Some(create) = context.input_mut().downcast_mut::<CreateMultipartUploadInput>() else {
            return Ok(());
        };
        let name = create.key.as_deref().and_then(last_part).map(str::to_owned);
        let metadata = create.metadata.get_or_insert_default();
        if let (Some(name), Some(write)) = (name, metadata.get(WRITE_KEY).cloned()) {
            metadata.insert(NAME_METADATA_KEY.to_owned(), name.clone());
            self.begin(&name, write);
        }
        Ok(())
    }
}

/// An HTTP client that sees the parts and the completions of uploads.
#[derive(Debug)]
struct Writing {
    inner: SharedHttpClient,
    writer: SumsWriter,
}

#[derive(Debug)]
struct Connection {
    inner: SharedHttpConnector,
    writer: SumsWriter,
}

impl HttpClient for Writing {
    fn http_connector(
        &self,
        settings: &HttpConnectorSettings,
        components: &RuntimeComponents,
    ) -> SharedHttpConnector {
        SharedHttpConnector::new(Connection {
            inner: self.inner.http_connector(settings, components),
            writer: self.writer.clone(),
        })
    }
}

/// What a request is to an upload in parts of an object.
enum Step {
    Part(u32),
    Completion,
    /// It is given up.
    Abort,
}

fn step_of(method: &str, uri: &str) -> Option<Step> {
    match method {
        "PUT" => parameter(uri, "partNumber")?.parse().ok().map(Step::Part),
        "POST" if has_parameter(uri, "uploadId") => Some(Step::Completion),
        "DELETE" if has_parameter(uri, "uploadId") => Some(Step::Abort),
        _ => None,
    }
}

fn parameter<'a>(uri: &'a str, name: &str) -> Option<&'a str> {
    let (_, query) = uri.split_once('?')?;
    query
        .split('&')
        .find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
}

impl HttpConnector for Connection {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        let name = last_part(path_of(request.uri())).map(str::to_owned);
        match (step_of(request.method(), request.uri()), name) {
            (Some(Step::Part(number)), Some(name)) => {
                let body = request.body().try_clone().ok_or(NOT_IN_MEMORY.into());
                match body.and_then(|body| pieces(body, NOT_IN_MEMORY)) {
                    Ok(bytes) => self.writer.take_part(&name, number, &Frames::take(bytes)),
                    Err(e) => return HttpConnectorFuture::ready(Err(ConnectorError::user(e))),
                }
                self.inner.call(request)
            }
            (Some(Step::Completion), Some(name)) => {
                let (writer, completing) = (self.writer.clone(), self.inner.call(request));
                HttpConnectorFuture::new(async move {
                    let failed = |e: StoreError| ConnectorError::other(e.into(), None);
                    let completing = async {
                        let mut answer = completing.await?;
                        let is_made = is_completed(&mut answer).await.map_err(ConnectorError::io)?;
                        Ok::<_, ConnectorError>((answer, is_made))
                    };
                    let (completed, put) = futures::join!(completing, writer.put_new(name.clone()));
                    let (answer, is_made) = completed?;
                    let is_put = put.map_err(failed)?;
                    if is_made {
                        if !is_put {
                            writer.replace(&name).await.map_err(failed)?;
                        }
                        writer.forget(&name);
                    }
                    Ok(answer)
                })
            }
            (Some(Step::Abort), Some(name)) => {
                self.writer.forget(&name);
                self.inner.call(request)
            }
            _ => self.inner.call(request),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_steps_of_an_upload_are_told_from_other_requests() {
        let is_part = |uri: &str| matches!(step_of("PUT", uri), Some(Step::Part(12)));
        assert!(is_part(
            "http://h/b/r/0000000001.0?x-id=UploadPart&partNumber=12&uploadId=u"
        ));
        assert!(!is_part("http://h/b/r/0000000001.0?x-id=PutObject"));
        let is_abort = |uri: &str| matches!(step_of("DELETE", uri), Some(Step::Abort));
        assert!(is_abort(
            "http://h/b/r/0000000001.0?x-id=AbortMultipartUpload&uploadId=u"
        ));
        assert!(!is_abort("http://h/b/r/0000000001.0?x-id=DeleteObject"));
        let is_completion = |method: &str, uri: &str| matches!(step_of(method, uri), Some(Step::Completion));
        assert!(is_completion("POST", "http://h/b/r/0000000001.0?uploadId=u"));
        assert!(!is_completion("POST", "http://h/b/r/0000000001.0?uploads"));
        assert!(!is_completion("DELETE", "http://h/b/r/0000000001.0?uploadId=u"));
    }
}
