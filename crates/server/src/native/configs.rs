//! Native configuration: publish, check, read, roll out, roll back, follow.
//!
//! Promises. C1: a content that does not satisfy the schema of its key is refused with the place and the reason, and one that was checked by a
//! schema which is no longer in force is not committed. A retry of what was done is answered from memory, whatever a check says by then. C2: a schema refers to nothing outside of itself, and its patterns run in linear time. C3: a
//! watch tells the whole version that an instance is given, each time that this changes, and loses no change over reconnects.
//! Not promised. That what a watch tells is each version ever published: of several changes between two looks the newest counts.
//! Relies on. The state machine, which compares the number of the schema; `follow.rs` for the changes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::BytesMut;
use jsonschema::{PatternOptions, Validator};
use prost::Message;
use sha2::{Digest as _, Sha256};
use tenure_machine::{
    CONFIG_CONTENT_BYTES_MAX, CONFIG_KEY_BYTES_MAX, CONFIG_NOTES_BYTES_MAX, CONFIG_SCHEMA_BYTES_MAX, Config,
    ConfigAfter, ConfigAt, ConfigNote, ConfigOp, ConfigPublish, ConfigReply, ConfigSchemaSet, ConfigStage,
    ConfigVersion, NamespaceId, NativeReply, Object, Op, OpReply, ROLLOUT_ALL, ROLLOUT_LABEL_BYTES_MAX,
    ROLLOUT_LABELS_MAX, Revision, Rollout, Stored, Txn,
};
use tenure_wire::Spaced;
use tenure_wire::tenure::v1;
use v1::config_watch_reply::Type;
use v1::txn_op::Op as Asked;

use super::sessions::{page_limit, query};
use super::{
    Caller, Changed, Finish, NativeFinish, Plan, PlanFn, Refused, change, decoded, either, look, mixed_up,
    mount_planned, namespace, refusal, refuse, request_id, seen, text, text_or_bytes,
};
use crate::Context;
use crate::driver::{Failure, View};
use crate::follow::{Followed, Follower, things};
use crate::rpc::{Call, Code, Incoming, Outgoing, Router, Status, frame_message};
use crate::status::{self as words, Kind};

const KEYS_PER_VISIT: usize = 50;
const QUIET: Duration = Duration::from_secs(5);
const BUFFER_BYTES: usize = 64 << 10;
const INSTANCE_BYTES_MAX: usize = 1_024;
/// A compiled pattern of a schema.
const PATTERN_BYTES_MAX: usize = 1 << 20;

pub(crate) fn mount(router: &mut Router, context: &Context) {
    checked(router, context, "/tenure.v1.Configs/Publish", publish);
    checked(router, context, "/tenure.v1.Configs/Rollback", rollback);
    checked(router, context, "/tenure.v1.Configs/SetSchema", set_schema);
    change(router, context, "/tenure.v1.Configs/Delete", plan_delete, |_, _, changed| after(changed));
    change(router, context, "/tenure.v1.Configs/Stage", plan_stage, |_, _, changed| after(changed));
    change(router, context, "/tenure.v1.Configs/Promote", plan_promote, |_, _, changed| after(changed));
    change(router, context, "/tenure.v1.Configs/Abort", plan_abort, |_, _, changed| after(changed));
    look(router, context, "/tenure.v1.Configs/Get", |request| request.stale, get);
    look(router, context, "/tenure.v1.Configs/History", |request| request.stale, history);
    look(router, context, "/tenure.v1.Configs/List", |request| request.stale, list);
    let context = context.clone();
    router.stream("/tenure.v1.Configs/Watch", move |call, incoming, outgoing| {
        watch(context.clone(), call, incoming, outgoing)
    });
}

/// Mounts a change that looks at the state before it is planned.
fn checked<Q, F, R>(router: &mut Router, context: &Context, path: &'static str, plan: F)
where
    Q: Message + Default + Spaced + 'static,
    F: Fn(Context, Caller, Q) -> R + Copy + Send + Sync + 'static,
    R: Future<Output = Result<(Txn, Verdict), Refused>> + Send + 'static,
{
    let planned: PlanFn = Arc::new(move |context, caller, message| {
        let (context, planning) = (context.clone(), plan(context.clone(), caller.clone(), decoded(message)?));
        Ok(Plan::Look(Box::pin(async move {
            let (txn, verdict) = planning.await?;
            heeded(&context, &txn, verdict).await?;
            Ok(Plan::Write(txn, finish()))
        })))
    });
    mount_planned(router, context, path, planned);
}

/// What a check of a content said. It is of this moment, and a retry may come when the schema or the current version is another.
pub(super) type Verdict = Result<(), Refused>;

/// Refuses by a verdict, unless the request was answered before: its retry is told what it was told then. Nothing is committed unchecked by that, since
/// what a check refused names no schema that checked it.
pub(super) async fn heeded(context: &Context, txn: &Txn, verdict: Verdict) -> Result<(), Refused> {
    let (Err(refused), Some(request)) = (&verdict, txn.request) else { return verdict };
    let (principal, digest, refused) = (txn.principal.clone(), txn.digest(), refused.clone());
    let is_known = query(context, false, move |view| view.machine.remembered(&principal, &request, digest).is_some());
    if is_known.await? { Ok(()) } else { Err(refused) }
}

/// The number of the schema that has checked a content, and the verdict.
fn judged(check: Result<u64, Refused>) -> (u64, Verdict) {
    check.map_or_else(|refused| (0, Err(refused)), |number| (number, Ok(())))
}

/// Writes the answer to a change.
fn finish() -> Finish {
    let finish: NativeFinish = Box::new(|_, changed| Ok(after(changed)?.encode_to_vec().into()));
    Finish::Native(finish)
}

// ---- What is asked ----

/// Whether an operation of a transaction looks at the state before it is planned.
pub(super) fn looks_first(asked: &Asked) -> bool {
    matches!(asked, Asked::ConfigPublish(_) | Asked::ConfigRollback(_))
}

/// Such an operation, what writes its answer, and the verdict.
pub(super) async fn looked(
    context: &Context,
    space: NamespaceId,
    asked: &Asked,
) -> Result<(Op, Finish, Verdict), Refused> {
    let (op, verdict) = match asked {
        Asked::ConfigPublish(request) => publish_op(context, space, request).await?,
        Asked::ConfigRollback(request) => rollback_op(context, space, request).await?,
        _ => return Err(refuse("op", "this operation looks at nothing first")),
    };
    Ok((op.into(), finish(), verdict))
}

async fn publish(
    context: Context,
    caller: Caller,
    request: v1::ConfigPublishRequest,
) -> Result<(Txn, Verdict), Refused> {
    let namespace = namespace(&request.namespace)?;
    let (op, verdict) = publish_op(&context, namespace, &request).await?;
    Ok((planned(namespace, request.request.as_ref(), &caller, op)?, verdict))
}

async fn publish_op(
    context: &Context,
    namespace: NamespaceId,
    request: &v1::ConfigPublishRequest,
) -> Result<(ConfigOp, Verdict), Refused> {
    let content: Arc<[u8]> = either("content", &request.content, &request.content_bytes)?.into();
    let mut note = note(&request.key, &request.author, &request.comment, request.expect_version)?;
    let rollout = request.rollout.as_ref().map(rollout).transpose()?;
    if content.len() > CONFIG_CONTENT_BYTES_MAX {
        return Err(Box::new(words::too_large(content.len(), CONFIG_CONTENT_BYTES_MAX)));
    }
    if request.media_type.len() > 255 {
        return Err(refuse("media_type", "a media type has at most 255 bytes"));
    }
    let schema = schema_of(context, namespace, &request.key).await?;
    let (checked_by, verdict) = judged(check(schema, content.clone(), "content").await);
    note.checked_by = checked_by;
    let (media, digest) = (request.media_type.as_str().into(), Sha256::digest(&content).into());
    Ok((ConfigOp::Publish(ConfigPublish { note, media, digest, content, rollout }), verdict))
}

async fn rollback(
    context: Context,
    caller: Caller,
    request: v1::ConfigRollbackRequest,
) -> Result<(Txn, Verdict), Refused> {
    let namespace = namespace(&request.namespace)?;
    let (op, verdict) = rollback_op(&context, namespace, &request).await?;
    Ok((planned(namespace, request.request.as_ref(), &caller, op)?, verdict))
}

async fn rollback_op(
    context: &Context,
    namespace: NamespaceId,
    request: &v1::ConfigRollbackRequest,
) -> Result<(ConfigOp, Verdict), Refused> {
    let mut note = note(&request.key, &request.author, &request.comment, request.expect_version)?;
    if request.version == 0 {
        return Err(refuse("version", "say which version to copy"));
    }
    let (key, number) = (request.key.clone(), request.version);
    let old = query(context, false, move |view| {
        view.machine.config_version(namespace, &key, number).map(|version| version.content.clone())
    });
    let old = old.await?;
    let schema = schema_of(context, namespace, &request.key).await?;
    // What is not there is refused by the state machine, in its order.
    let number = schema.as_ref().map_or(0, |(number, _)| *number);
    let (checked_by, verdict) = match old {
        Some(content) => judged(check(schema, content, "version").await),
        None => (number, Ok(())),
    };
    note.checked_by = checked_by;
    Ok((ConfigOp::Rollback((note, request.version)), verdict))
}

fn plan_delete(_: &Context, caller: &Caller, request: &v1::ConfigDeleteRequest) -> Result<Txn, Refused> {
    let namespace = namespace(&request.namespace)?;
    let note = note(&request.key, &request.author, &request.comment, request.expect_version)?;
    if request.purge_version == 0 {
        return planned(namespace, request.request.as_ref(), caller, ConfigOp::Delete(note));
    }
    if note.expect.is_some() || !note.author.is_empty() || !note.comment.is_empty() {
        return Err(refuse("purge_version", "a purge leaves nothing to note on, and expects this version"));
    }
    let at = ConfigAt { key: note.key, version: request.purge_version };
    planned(namespace, request.request.as_ref(), caller, ConfigOp::Purge(at))
}

async fn set_schema(
    context: Context,
    caller: Caller,
    request: v1::ConfigSetSchemaRequest,
) -> Result<(Txn, Verdict), Refused> {
    let namespace = namespace(&request.namespace)?;
    check_key(&request.key)?;
    if request.schema.len() > CONFIG_SCHEMA_BYTES_MAX {
        return Err(Box::new(words::too_large(request.schema.len(), CONFIG_SCHEMA_BYTES_MAX)));
    }
    let (mut checked, mut text, mut verdict) = (0, None, Ok(()));
    if !request.schema.is_empty() {
        let key = request.key.clone();
        let current = query(&context, false, move |view| {
            let config = view.machine.object::<Config>(namespace, key.as_bytes())?;
            config.current.as_ref().map(|version| (version.number, version.content.clone()))
        });
        let current = current.await?;
        let schema: Arc<[u8]> = request.schema.as_bytes().into();
        let (number, content) = current.map_or((0, None), |(number, content)| (number, Some(content)));
        let check = run_check(schema.clone(), content, "schema").await;
        (checked, verdict) = judged(check.map(|()| number));
        text = Some(schema);
    }
    let set = ConfigSchemaSet { key: request.key.as_str().into(), expect: request.expect_schema, checked, text };
    Ok((planned(namespace, request.request.as_ref(), &caller, ConfigOp::SetSchema(set))?, verdict))
}

fn plan_stage(_: &Context, caller: &Caller, request: &v1::ConfigStageRequest) -> Result<Txn, Refused> {
    let ConfigAt { key, version } = at(&request.key, request.version)?;
    let rollout = request.rollout.as_ref().ok_or_else(|| refuse("rollout", "say whom the candidate is given to"))?;
    let op = ConfigOp::Stage(ConfigStage { key, version, rollout: self::rollout(rollout)? });
    planned(namespace(&request.namespace)?, request.request.as_ref(), caller, op)
}

fn plan_promote(_: &Context, caller: &Caller, request: &v1::ConfigPromoteRequest) -> Result<Txn, Refused> {
    let op = ConfigOp::Promote(at(&request.key, request.version)?);
    planned(namespace(&request.namespace)?, request.request.as_ref(), caller, op)
}

fn plan_abort(_: &Context, caller: &Caller, request: &v1::ConfigAbortRequest) -> Result<Txn, Refused> {
    let op = ConfigOp::Abort(at(&request.key, request.version)?);
    planned(namespace(&request.namespace)?, request.request.as_ref(), caller, op)
}

fn planned(
    namespace: NamespaceId,
    request: Option<&v1::RequestMeta>,
    caller: &Caller,
    op: ConfigOp,
) -> Result<Txn, Refused> {
    Ok(Txn { namespace, request: request_id(request, caller)?, ..Txn::of(op.into()) })
}

fn check_key(key: &str) -> Result<(), Refused> {
    check_key_of("key", key)
}

pub(super) fn check_key_of(field: &str, key: &str) -> Result<(), Refused> {
    if key.is_empty() || key.len() > CONFIG_KEY_BYTES_MAX || key.contains('\0') {
        return Err(refuse(field, format!("a key has 1 to {CONFIG_KEY_BYTES_MAX} bytes, none of them zero")));
    }
    Ok(())
}

fn note(key: &str, author: &str, comment: &str, expect: Option<u64>) -> Result<ConfigNote, Refused> {
    check_key(key)?;
    if author.len() + comment.len() > CONFIG_NOTES_BYTES_MAX {
        return Err(refuse("comment", format!("author and comment have at most {CONFIG_NOTES_BYTES_MAX} bytes")));
    }
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let time_ms = u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
    let (key, author, comment) = (key.into(), author.into(), comment.into());
    Ok(ConfigNote { key, expect, author, comment, time_ms, checked_by: 0 })
}

fn at(key: &str, version: u64) -> Result<ConfigAt, Refused> {
    check_key(key)?;
    if version == 0 {
        return Err(refuse("version", "name the candidate by its number"));
    }
    Ok(ConfigAt { key: key.into(), version })
}

fn rollout(rollout: &v1::ConfigRollout) -> Result<Rollout, Refused> {
    if rollout.share > ROLLOUT_ALL {
        return Err(refuse("rollout.share", format!("a share is 0 to {ROLLOUT_ALL}, in hundredths of a percent")));
    }
    let bytes: usize = rollout.labels.iter().map(|(name, value)| name.len() + value.len()).sum();
    if rollout.labels.len() > ROLLOUT_LABELS_MAX || bytes > ROLLOUT_LABEL_BYTES_MAX {
        let why = format!("at most {ROLLOUT_LABELS_MAX} labels of {ROLLOUT_LABEL_BYTES_MAX} bytes together");
        return Err(refuse("rollout.labels", why));
    }
    let labels = rollout.labels.iter().map(|(name, value)| (name.as_str().into(), value.as_str().into())).collect();
    Ok(Rollout { share: rollout.share, labels })
}

// ---- Schemas ----

type Schema = (u64, Arc<[u8]>);

async fn schema_of(context: &Context, namespace: NamespaceId, key: &str) -> Result<Option<Schema>, Refused> {
    let key = key.to_owned();
    let look = move |view: &View<'_>| {
        let schema = view.machine.object::<Config>(namespace, key.as_bytes())?.schema.as_ref()?;
        Some((schema.number, schema.text.clone()))
    };
    query(context, false, look).await
}

/// Checks a content by the schema in force, and tells its number.
async fn check(schema: Option<Schema>, content: Arc<[u8]>, field: &'static str) -> Result<u64, Refused> {
    let Some((number, text)) = schema else { return Ok(0) };
    run_check(text, Some(content), field).await?;
    Ok(number)
}

/// Off the threads that serve others: a large schema takes its time.
async fn run_check(schema: Arc<[u8]>, content: Option<Arc<[u8]>>, field: &'static str) -> Result<(), Refused> {
    let work = move || {
        let validator = compile(&schema)?;
        content.map_or(Ok(()), |content| satisfies(&validator, &content, field))
    };
    let ended = tokio::task::spawn_blocking(work).await;
    ended.unwrap_or_else(|_| Err(refuse(field, "the check came to no end")))
}

fn compile(schema: &[u8]) -> Result<Validator, Refused> {
    let schema: serde_json::Value =
        serde_json::from_slice(schema).map_err(|error| refuse("schema", format!("the schema is no JSON: {error}")))?;
    let patterns = PatternOptions::regex().size_limit(PATTERN_BYTES_MAX);
    let built = jsonschema::options().with_pattern_options(patterns).build(&schema);
    built.map_err(|error| {
        let mut refused = refuse("schema", format!("this is no JSON Schema that can be used: {error}"));
        refused.facts.insert("at".to_owned(), error.instance_path().to_string());
        refused
    })
}

fn satisfies(validator: &Validator, content: &[u8], field: &str) -> Result<(), Refused> {
    let value: serde_json::Value = serde_json::from_slice(content)
        .map_err(|error| refuse(field, format!("there is a schema, and the content is no JSON: {error}")))?;
    let Some(error) = validator.iter_errors(&value).next() else { return Ok(()) };
    let (at, problem) = (error.instance_path().to_string(), shortened(error.to_string()));
    let mut refused = refuse(field, format!("the content does not satisfy the schema at `{at}`: {problem}"));
    refused.facts.insert("at".to_owned(), at);
    refused.facts.insert("problem".to_owned(), problem);
    Err(refused)
}

/// An error quotes the value that is wrong, which may be all of it.
fn shortened(text: String) -> String {
    match text.char_indices().nth(500) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

// ---- What is answered ----

fn after(changed: Changed) -> Result<v1::ConfigChangeReply, Refused> {
    let OpReply::Native(reply) = &changed.reply else { return Err(mixed_up()) };
    let NativeReply::Config(ConfigReply::Changed(ConfigAfter { version, current, candidate, schema })) = **reply else {
        return Err(mixed_up());
    };
    let header = Some(changed.header);
    Ok(v1::ConfigChangeReply { header, version, current_version: current, candidate_version: candidate, schema })
}

fn shown(key: &str, version: &ConfigVersion, contents: bool) -> v1::ConfigVersion {
    let (content, content_bytes) = if contents { text_or_bytes(&version.content) } else { Default::default() };
    let digest = if version.deleted { String::new() } else { hex(&version.digest) };
    v1::ConfigVersion {
        key: key.to_owned(),
        version: version.number,
        content,
        content_bytes,
        media_type: version.media.to_string(),
        author: version.author.to_string(),
        comment: version.comment.to_string(),
        time_ms: version.time_ms,
        digest,
        revision: version.revision.0,
        schema: version.schema,
        copy_of: version.copy_of,
        deleted: version.deleted,
        candidate: false,
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn missing(key: &str, version: u64) -> Refused {
    let facts = [("name", key.to_owned()), ("version", version.to_string())];
    Box::new(words::not_found(&format!("there is no such configuration or version of `{key}`"), &facts))
}

fn candidate_of(config: &Config) -> u64 {
    config.candidate.as_ref().map_or(0, |candidate| candidate.version.number)
}

fn given(key: &str, config: &Config, asker: &Asker) -> Option<v1::ConfigVersion> {
    let version = config.for_instance(key, &asker.instance, &asker.labels)?;
    let candidate = version.number == candidate_of(config);
    Some(v1::ConfigVersion { candidate, ..shown(key, version, true) })
}

/// Which instance asks.
struct Asker {
    instance: String,
    labels: BTreeMap<String, String>,
}

impl Asker {
    fn read(instance: &str, labels: &[String]) -> Result<Self, Refused> {
        let bytes: usize = labels.iter().map(String::len).sum();
        if instance.len() > INSTANCE_BYTES_MAX {
            return Err(refuse("instance", format!("an instance has at most {INSTANCE_BYTES_MAX} bytes")));
        }
        if bytes > ROLLOUT_LABEL_BYTES_MAX {
            return Err(refuse("labels", format!("labels have at most {ROLLOUT_LABEL_BYTES_MAX} bytes together")));
        }
        let pair = |label: &String| {
            let (name, value) = label.split_once('=')?;
            Some((name.to_owned(), value.to_owned()))
        };
        let labels: Option<_> = labels.iter().map(pair).collect();
        let labels = labels.ok_or_else(|| refuse("labels", "a label is written `name=value`"))?;
        Ok(Self { instance: instance.to_owned(), labels })
    }
}

fn get(view: &View<'_>, request: &v1::ConfigGetRequest) -> Result<v1::ConfigGetReply, Refused> {
    let (ns, key) = (namespace(&request.namespace)?, request.key.as_str());
    check_key(key)?;
    let asker = Asker::read(&request.instance, &request.labels)?;
    let config = view.machine.object::<Config>(ns, key.as_bytes()).ok_or_else(|| missing(key, request.version))?;
    let version = match request.version {
        0 => given(key, config, &asker),
        number => view.machine.config_version(ns, key, number).map(|version| v1::ConfigVersion {
            candidate: number == candidate_of(config),
            ..shown(key, version, true)
        }),
    };
    let schema = config.schema.as_ref();
    let text = schema.filter(|_| request.schema).map(|schema| String::from_utf8_lossy(&schema.text).into_owned());
    Ok(v1::ConfigGetReply {
        header: seen(view, request.stale),
        version: Some(
            version.ok_or_else(|| missing(key, if request.version == 0 { config.newest } else { request.version }))?,
        ),
        schema: schema.map_or(0, |schema| schema.number),
        schema_text: text.unwrap_or_default(),
        candidate_version: candidate_of(config),
        rollout: config.candidate.as_ref().map(|candidate| v1::ConfigRollout {
            share: candidate.rollout.share,
            labels: candidate.rollout.labels.iter().map(|(n, v)| (n.to_string(), v.to_string())).collect(),
        }),
        revision: config.revision.0,
    })
}

fn history(view: &View<'_>, request: &v1::ConfigHistoryRequest) -> Result<v1::ConfigHistoryReply, Refused> {
    let (ns, key) = (namespace(&request.namespace)?, request.key.as_str());
    check_key(key)?;
    let config = view.machine.object::<Config>(ns, key.as_bytes()).ok_or_else(|| missing(key, 0))?;
    let kept = view.machine.config_versions(ns, key, 0, usize::MAX);
    let candidate = candidate_of(config);
    let version = |version: &&ConfigVersion| v1::ConfigVersion {
        candidate: version.number == candidate,
        ..shown(key, version, request.contents)
    };
    Ok(v1::ConfigHistoryReply {
        header: seen(view, request.stale),
        versions: kept.iter().rev().map(version).collect(),
        current_version: config.current.as_ref().map_or(0, |current| current.number),
        candidate_version: candidate,
    })
}

fn list(view: &View<'_>, request: &v1::ConfigListRequest) -> Result<v1::ConfigListReply, Refused> {
    let (ns, max) = (namespace(&request.namespace)?, page_limit(request.limit)?);
    let after = Some(request.after.as_bytes()).filter(|after| !after.is_empty());
    let page = view.machine.objects::<Config>(ns, request.prefix.as_bytes(), after, max);
    let next = page.last().filter(|_| page.len() == max).map_or_else(String::new, |(key, _)| text(key));
    let one = |(key, config): &(Box<[u8]>, &Config)| {
        let key = text(key);
        match &config.current {
            Some(current) => Some(shown(&key, current, false)),
            None if request.deleted => {
                view.machine.config_version(ns, &key, config.newest).map(|version| shown(&key, version, false))
            }
            None => None,
        }
    };
    Ok(v1::ConfigListReply { header: seen(view, request.stale), configs: page.iter().filter_map(one).collect(), next })
}

// ---- Following ----

async fn watch(context: Context, _: Call, mut incoming: Incoming, outgoing: Outgoing) -> Result<(), Status> {
    let Some(message) = incoming.next().await else { return Err(Status::invalid_argument("no request came")) };
    let request: v1::ConfigWatchRequest = decoded(message?).map_err(refusal)?;
    let _place = context.stream_place().map_err(refusal)?;
    let mut watcher = Watcher::read(context, &request, &outgoing).map_err(refusal)?;
    let resume = Watcher::place(&request).map_err(refusal)?;
    tokio::select! {
        ended = watcher.run(resume) => ended,
        () = outgoing.closed() => Err(cancelled()),
    }
}

fn cancelled() -> Status {
    Status::new(Code::Cancelled, "the caller no longer listens")
}

fn failed(failure: &Failure) -> Status {
    refusal(Box::new(words::native_failure(failure, Kind::Read)))
}

struct Watcher<'a> {
    context: Context,
    namespace: NamespaceId,
    key: String,
    prefix: bool,
    asker: Asker,
    /// What was told last of each key: its version, by number and revision.
    told: BTreeMap<String, (u64, u64)>,
    outgoing: &'a Outgoing,
    buffer: BytesMut,
}

impl<'a> Watcher<'a> {
    fn read(context: Context, request: &v1::ConfigWatchRequest, outgoing: &'a Outgoing) -> Result<Self, Refused> {
        if !request.prefix || !request.key.is_empty() {
            check_key(&request.key)?;
        }
        Ok(Self {
            context,
            namespace: namespace(&request.namespace)?,
            key: request.key.clone(),
            prefix: request.prefix,
            asker: Asker::read(&request.instance, &request.labels)?,
            told: BTreeMap::new(),
            outgoing,
            buffer: BytesMut::new(),
        })
    }

    fn place(request: &v1::ConfigWatchRequest) -> Result<Option<Revision>, Refused> {
        let place = Some(request.resume.as_str()).filter(|resume| !resume.is_empty());
        let number = place.map(|place| place.parse().ok().filter(|&revision: &u64| revision < u64::MAX));
        number.map(|n| n.map(Revision).ok_or_else(|| refuse("resume", "a place is as an answer told it"))).transpose()
    }

    async fn run(&mut self, resume: Option<Revision>) -> Result<(), Status> {
        let mut after = match resume {
            Some(revision) => revision,
            None => self.tell_all().await?,
        };
        loop {
            let lowest = self.follow(after).await?;
            tracing::debug!(key = self.key, %after, %lowest, "a watch of configuration begins anew");
            self.told.clear();
            self.put(v1::ConfigWatchReply { r#type: Type::Reset.into(), ..Default::default() }).await?;
            after = self.tell_all().await?;
        }
    }

    /// Tells what there is, page by page. What changes between the pages is told behind them.
    async fn tell_all(&mut self) -> Result<Revision, Status> {
        let (mut after, mut first) = (None::<Box<[u8]>>, None);
        loop {
            let (ns, key, prefix) = (self.namespace, self.key.clone(), self.prefix);
            let is_first = first.is_none();
            let from = after.take();
            let look = move |view: &View<'_>| {
                let page: Vec<(Box<[u8]>, Config)> = if prefix {
                    let page = view.machine.objects::<Config>(ns, key.as_bytes(), from.as_deref(), KEYS_PER_VISIT);
                    page.into_iter().map(|(key, config)| (key, config.clone())).collect()
                } else {
                    let found = view.machine.object::<Config>(ns, key.as_bytes());
                    found.map(|config| (key.as_bytes().into(), config.clone())).into_iter().collect()
                };
                (page, view.machine.revision())
            };
            let page = self.context.query(!is_first, look).await;
            let (page, revision) = page.map_err(|failure| failed(&failure))?;
            let first = *first.get_or_insert(revision);
            // What is gone when a snapshot is told was never there for its reader.
            for (key, config) in page.iter().filter(|(_, config)| config.current.is_some()) {
                self.tell(&text(key), Some(config), String::new()).await?;
            }
            match page.into_iter().nth(KEYS_PER_VISIT - 1) {
                Some((last, _)) if prefix => after = Some(last),
                _ => {
                    let synced = Type::Synced.into();
                    let resume = first.0.to_string();
                    self.put(v1::ConfigWatchReply { r#type: synced, resume, ..Default::default() }).await?;
                    self.flush().await?;
                    return Ok(first);
                }
            }
        }
    }

    /// Tells every change behind a place; returns the lowest revision that is kept if what comes next is not.
    async fn follow(&mut self, after: Revision) -> Result<Revision, Status> {
        let span = things(self.namespace, Config::KIND, self.key.as_bytes(), self.prefix);
        let mut follower = Follower::new(&self.context.handle, span, after.next(), QUIET);
        loop {
            match follower.next().await.map_err(|failure| failed(&failure))? {
                Followed::Changes(changes) => {
                    let last = changes.len().saturating_sub(1);
                    for (place, change) in changes.iter().enumerate() {
                        let record = &change.record;
                        let revision = record.mod_revision();
                        // A place is behind a whole revision.
                        let is_whole = place == last || changes[place + 1].record.mod_revision() > revision;
                        let resume = if is_whole { revision.to_string() } else { String::new() };
                        let config = match Object::from_record(record.value()) {
                            Some(Object::Config(config)) => Some(config),
                            _ => None,
                        };
                        // The name of a thing begins with the letter of its kind.
                        let name = record.name().get(1..).unwrap_or_default();
                        self.tell(&text(name), config.as_deref(), resume).await?;
                    }
                }
                Followed::Through(revision) => {
                    let (bookmark, resume) = (Type::Bookmark.into(), revision.to_string());
                    self.put(v1::ConfigWatchReply { r#type: bookmark, resume, ..Default::default() }).await?;
                }
                Followed::Gone(lowest) => return Ok(lowest),
            }
            self.flush().await?;
        }
    }

    /// Tells what the instance is given now, if that is something else than what it was told last.
    async fn tell(&mut self, key: &str, config: Option<&Config>, resume: String) -> Result<(), Status> {
        let version = config.and_then(|config| given(key, config, &self.asker));
        let reply = match version {
            Some(version) => {
                let now = (version.version, version.revision);
                if self.told.insert(key.to_owned(), now) == Some(now) {
                    return Ok(());
                }
                v1::ConfigWatchReply { r#type: Type::Given.into(), version: Some(version), resume }
            }
            None => {
                self.told.remove(key);
                let gone = v1::ConfigVersion { key: key.to_owned(), deleted: true, ..Default::default() };
                v1::ConfigWatchReply { r#type: Type::Deleted.into(), version: Some(gone), resume }
            }
        };
        self.put(reply).await
    }

    async fn put(&mut self, reply: v1::ConfigWatchReply) -> Result<(), Status> {
        frame_message(&reply, &mut self.buffer);
        if self.buffer.len() >= BUFFER_BYTES { self.flush().await } else { Ok(()) }
    }

    async fn flush(&mut self) -> Result<(), Status> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        self.outgoing.send_framed(self.buffer.split().freeze()).await.map_err(|_| cancelled())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(schema: &str, content: &str) -> Result<(), String> {
        let validator = compile(schema.as_bytes()).map_err(|refused| refused.facts["field"].clone())?;
        satisfies(&validator, content.as_bytes(), "content").map_err(|refused| refused.facts["field"].clone())
    }

    #[test]
    fn contents_are_checked_by_their_schema() {
        let schema = r#"{"type": "object", "required": ["n"], "properties": {"n": {"maximum": 5}}}"#;
        assert_eq!(verdict(schema, r#"{"n": 5}"#), Ok(()));
        for wrong in [r#"{"n": 6}"#, "{}", "no json", ""] {
            assert_eq!(verdict(schema, wrong), Err("content".to_owned()), "{wrong}");
        }
    }

    /// Nothing is fetched or read for a schema, a circle comes to an end, and a pattern does not run for ever.
    #[test]
    fn schemas_that_reach_out_or_explode_are_refused() {
        for schema in [
            "no json",
            r#"{"type": 7}"#,
            r#"{"$ref": "http://127.0.0.1:1/x.json"}"#,
            r#"{"$ref": "file:///etc/hostname"}"#,
            r#"{"pattern": "(((((a{1,100}){1,100}){1,100}){1,100}){1,100})"}"#,
            r#"{"pattern": "(?=a)b"}"#,
        ] {
            assert_eq!(verdict(schema, "1"), Err("schema".to_owned()), "{schema}");
        }
        for circle in [r##"{"$ref": "#"}"##, r##"{"allOf": [{"$ref": "#"}]}"##] {
            assert_eq!(verdict(circle, "1"), Ok(()), "{circle}");
        }
        let text = format!("\"{}b\"", "a".repeat(100));
        assert_eq!(verdict(r#"{"pattern": "^(a+)+$"}"#, &text), Err("content".to_owned()));
    }
}
