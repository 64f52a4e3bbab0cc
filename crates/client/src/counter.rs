//! Counters and sequences.
//!
//! Promises. An addition happens at most once, however often its answer is lost. What a sequence gave to one caller it gives to nobody else.
//! Not promised. A sequence without gaps: numbers that were given to a process that died are lost.

use std::ops::{Range, RangeInclusive};

use tenure_wire::tenure::v1;
use tenure_wire::tenure::v1::counter_expect::Fact;

use crate::client::{Client, all_pages};
use crate::error::{Error, found};
use crate::kv::carried_out;

impl Client {
    /// The counter of this name. One that is not there counts as 0 and is made by its first change.
    ///
    /// ```no_run
    /// # async fn example(client: tenure_client::Client) -> Result<(), tenure_client::Error> {
    /// use tenure_client::Code;
    /// let seats = client.counter("flights/LH1/seats");
    /// seats.set(180).if_absent().await?;
    /// match seats.add(-1).min(0).await {
    ///     Ok(left) => println!("{} seats left", left.value),
    ///     Err(error) if error.code() == Some(Code::Conflict) => println!("sold out"),
    ///     Err(error) => return Err(error),
    /// }
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn counter(&self, name: impl Into<String>) -> Counter {
        Counter { client: self.clone(), name: name.into() }
    }

    /// The sequence of this name. One that is not there begins at 1.
    ///
    /// ```no_run
    /// # async fn example(client: tenure_client::Client) -> Result<(), tenure_client::Error> {
    /// let invoices = client.sequence("invoices");
    /// let one = invoices.next().await?;
    /// // A worker that needs many takes a block, and loses what is left of it when it dies.
    /// for number in invoices.block(100).await? {
    ///     println!("{one} was taken before {number}");
    /// }
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn sequence(&self, name: impl Into<String>) -> Sequence {
        Sequence { client: self.clone(), name: name.into() }
    }

    /// Every counter whose name begins with `prefix`, by name.
    ///
    /// # Errors
    /// As every read.
    pub async fn counters(&self, prefix: &str) -> Result<Vec<CounterInfo>, Error> {
        let page = |after| async move {
            let (prefix, namespace) = (prefix.to_owned(), self.namespace());
            let request = v1::CounterListRequest { prefix, limit: 1_000, after, namespace, ..Default::default() };
            let ask = |channel| {
                let (mut counters, request) = (self.counters_of(channel), request.clone());
                async move { counters.list(request).await }
            };
            let reply = self.read(ask).await?;
            Ok((reply.counters.into_iter().map(CounterInfo::from).collect(), reply.next))
        };
        all_pages(page).await
    }

    /// Every sequence whose name begins with `prefix`, by name.
    ///
    /// # Errors
    /// As every read.
    pub async fn sequences(&self, prefix: &str) -> Result<Vec<SequenceInfo>, Error> {
        let page = |after| async move {
            let (prefix, namespace) = (prefix.to_owned(), self.namespace());
            let request = v1::SequenceListRequest { prefix, limit: 1_000, after, namespace, ..Default::default() };
            let ask = |channel| {
                let (mut sequences, request) = (self.sequences_of(channel), request.clone());
                async move { sequences.list(request).await }
            };
            let reply = self.read(ask).await?;
            Ok((reply.sequences.into_iter().map(SequenceInfo::from).collect(), reply.next))
        };
        all_pages(page).await
    }
}

/// A counter as it was at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CounterInfo {
    /// Its name.
    pub name: String,
    /// Its value.
    pub value: i64,
    /// The commit of its last change. It never comes again, not even for a later counter of the same name.
    pub revision: u64,
}

impl From<v1::Counter> for CounterInfo {
    fn from(counter: v1::Counter) -> Self {
        Self { name: counter.name, value: counter.value, revision: counter.revision }
    }
}

/// A sequence as it was at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SequenceInfo {
    /// Its name.
    pub name: String,
    /// The first number that nobody was given.
    pub next: u64,
    /// The commit that moved it last.
    pub revision: u64,
}

impl From<v1::Sequence> for SequenceInfo {
    fn from(sequence: v1::Sequence) -> Self {
        Self { name: sequence.name, next: sequence.next, revision: sequence.revision }
    }
}

/// A counter by its name; see [`Client::counter`].
#[derive(Clone, Debug)]
pub struct Counter {
    client: Client,
    name: String,
}

impl Counter {
    /// Adds `delta`, which may be below zero.
    #[must_use = "nothing is added before .await"]
    pub fn add(&self, delta: i64) -> CounterAdd<'_> {
        CounterAdd { counter: self, delta, min: None, max: None }
    }

    /// Sets the value.
    #[must_use = "nothing is set before .await"]
    pub fn set(&self, value: i64) -> CounterSet<'_> {
        CounterSet { counter: self, value, expect: None }
    }

    /// Deletes the counter; `false`: there was none.
    #[must_use = "nothing is deleted before .await"]
    pub fn delete(&self) -> CounterDelete<'_> {
        CounterDelete { counter: self, expect: None }
    }

    /// Reads it; `None`: there is none.
    ///
    /// # Errors
    /// As every read.
    pub async fn get(&self) -> Result<Option<CounterInfo>, Error> {
        let request =
            v1::CounterGetRequest { name: self.name.clone(), namespace: self.client.namespace(), ..Default::default() };
        let read = self.client.read(|channel| {
            let (mut counters, request) = (self.client.counters_of(channel), request.clone());
            async move { counters.get(request).await }
        });
        found(read.await.map(|reply| reply.counter.map(CounterInfo::from)))
    }
}

fn told(counter: Option<v1::Counter>) -> Result<CounterInfo, Error> {
    counter.map(CounterInfo::from).ok_or_else(|| Error::Protocol("an answer without the counter".to_owned()))
}

/// An addition to be made; its answer is the counter afterwards. Refused with [`Code::Conflict`](crate::Code::Conflict) where the sum would leave the bounds or 64 bits:
/// the fact `value` then tells where the counter is.
#[derive(Clone, Debug)]
pub struct CounterAdd<'a> {
    counter: &'a Counter,
    delta: i64,
    min: Option<i64>,
    max: Option<i64>,
}

impl CounterAdd<'_> {
    /// Only if the sum is not below.
    #[must_use]
    pub fn min(self, min: i64) -> Self {
        Self { min: Some(min), ..self }
    }

    /// Only if the sum is not above.
    #[must_use]
    pub fn max(self, max: i64) -> Self {
        Self { max: Some(max), ..self }
    }

    /// Only if the sum is within.
    #[must_use]
    pub fn within(self, bounds: RangeInclusive<i64>) -> Self {
        self.min(*bounds.start()).max(*bounds.end())
    }

    async fn run(self) -> Result<CounterInfo, Error> {
        let client = &self.counter.client;
        let request = v1::CounterAddRequest {
            name: self.counter.name.clone(),
            delta: Some(self.delta),
            min: self.min,
            max: self.max,
            namespace: client.namespace(),
            request: None,
        };
        let plan = client.plan("counter add", true);
        let reply: v1::CounterAddReply = client.change(plan, "/tenure.v1.Counters/Add", &request).await?;
        told(reply.counter)
    }
}

carried_out!(CounterAdd<'a> => CounterInfo, run);

macro_rules! expecting {
    ($name:ident) => {
        impl $name<'_> {
            /// Only if there is no such counter.
            #[must_use]
            pub fn if_absent(self) -> Self {
                Self { expect: Some(Fact::Absent(true)), ..self }
            }

            /// Only if it has this value.
            #[must_use]
            pub fn if_value(self, value: i64) -> Self {
                Self { expect: Some(Fact::Value(value)), ..self }
            }

            /// Only if this was its last change.
            #[must_use]
            pub fn if_revision(self, revision: u64) -> Self {
                Self { expect: Some(Fact::Revision(revision)), ..self }
            }
        }
    };
}

/// A value to be set; its answer is the counter afterwards. Refused with [`Code::Conflict`](crate::Code::Conflict) where the counter is not as expected.
#[derive(Clone, Debug)]
pub struct CounterSet<'a> {
    counter: &'a Counter,
    value: i64,
    expect: Option<Fact>,
}

expecting!(CounterSet);
carried_out!(CounterSet<'a> => CounterInfo, run);

impl CounterSet<'_> {
    async fn run(self) -> Result<CounterInfo, Error> {
        let client = &self.counter.client;
        let request = v1::CounterSetRequest {
            name: self.counter.name.clone(),
            value: Some(self.value),
            expect: self.expect.map(|fact| v1::CounterExpect { fact: Some(fact) }),
            namespace: client.namespace(),
            request: None,
        };
        let plan = client.plan("counter set", true);
        let reply: v1::CounterSetReply = client.change(plan, "/tenure.v1.Counters/Set", &request).await?;
        told(reply.counter)
    }
}

/// A counter to be deleted. Refused with [`Code::Conflict`](crate::Code::Conflict) where it is not as expected.
#[derive(Clone, Debug)]
pub struct CounterDelete<'a> {
    counter: &'a Counter,
    expect: Option<Fact>,
}

expecting!(CounterDelete);
carried_out!(CounterDelete<'a> => bool, run);

impl CounterDelete<'_> {
    async fn run(self) -> Result<bool, Error> {
        let client = &self.counter.client;
        let request = v1::CounterDeleteRequest {
            name: self.counter.name.clone(),
            expect: self.expect.map(|fact| v1::CounterExpect { fact: Some(fact) }),
            namespace: client.namespace(),
            request: None,
        };
        let plan = client.plan("counter delete", true);
        let reply: v1::CounterDeleteReply = client.change(plan, "/tenure.v1.Counters/Delete", &request).await?;
        Ok(reply.deleted)
    }
}

/// A sequence by its name; see [`Client::sequence`].
#[derive(Clone, Debug)]
pub struct Sequence {
    client: Client,
    name: String,
}

impl Sequence {
    /// The next number, which belongs to the caller alone.
    ///
    /// # Errors
    /// Refused with [`Code::Conflict`](crate::Code::Conflict) where the sequence is used up, at 2^63.
    pub async fn next(&self) -> Result<u64, Error> {
        Ok(self.block(1).await?.start)
    }

    /// The next `block` numbers, which belong to the caller alone.
    ///
    /// # Errors
    /// As [`Sequence::next`].
    pub async fn block(&self, block: u64) -> Result<Range<u64>, Error> {
        self.block_at_least(block, 0).await
    }

    /// The next `block` numbers from `at_least` on: what is below is never given out any more, such as the numbers of another system.
    ///
    /// # Errors
    /// As [`Sequence::next`].
    pub async fn block_at_least(&self, block: u64, at_least: u64) -> Result<Range<u64>, Error> {
        if block == 0 {
            return Err(Error::Invalid("a block has at least one number".to_owned()));
        }
        let request = v1::SequenceNextRequest {
            name: self.name.clone(),
            block,
            at_least,
            namespace: self.client.namespace(),
            request: None,
        };
        let plan = self.client.plan("sequence next", true);
        let reply: v1::SequenceNextReply = self.client.change(plan, "/tenure.v1.Sequences/Next", &request).await?;
        Ok(reply.from..reply.to)
    }

    /// Where it goes on; `None`: nobody has taken a number yet.
    ///
    /// # Errors
    /// As every read.
    pub async fn get(&self) -> Result<Option<SequenceInfo>, Error> {
        let (name, namespace) = (self.name.clone(), self.client.namespace());
        let request = v1::SequenceGetRequest { name, namespace, ..Default::default() };
        let read = self.client.read(|channel| {
            let (mut sequences, request) = (self.client.sequences_of(channel), request.clone());
            async move { sequences.get(request).await }
        });
        found(read.await.map(|reply| reply.sequence.map(SequenceInfo::from)))
    }
}
