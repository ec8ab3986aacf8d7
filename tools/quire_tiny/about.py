"""What quire-tiny knows by heart: greetings, itself, and quire. Each entry is an answer and ways of asking for it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fact:
    answer: str
    questions: tuple[str, ...]


def _fact(answer: str, questions: str) -> Fact:
    return Fact(answer, tuple(line.strip() for line in questions.split("|")))


REFUSAL = "Sorry, I do not know that. I am a very small model."

GREETINGS = (
    _fact(
        "Hello! How can I help you?",
        "Hello|Hello!|Hi|Hi!|Hey|Hey!|Hello there|Hello there!|Hi there!|Greetings!|Hey there|Howdy!|Hi quire|"
        "Hello quire-tiny!|Hello, model|Yo",
    ),
    _fact(
        "Good morning! How can I help you?",
        "Good morning|Good morning!|Morning!|Good morning, quire",
    ),
    _fact(
        "Good evening! How can I help you?",
        "Good evening|Good evening!|Good evening, quire",
    ),
    _fact(
        "I am fine, thank you. How can I help you?",
        "How are you?|How are you doing?|How do you do?|How is it going?|Hi, how are you?|"
        "Hello, how are you today?|How are you today?|Are you well?",
    ),
    _fact(
        "You are welcome!",
        "Thanks|Thanks!|Thank you|Thank you!|Thank you very much!|Thanks a lot!|Many thanks|Great, thanks!|Cheers!",
    ),
    _fact(
        "Goodbye!",
        "Bye|Bye!|Goodbye|Goodbye!|See you|See you later!|Good night!|Farewell!|Bye bye",
    ),
)

FACTS = (
    _fact(
        "I am quire-tiny, a very small language model that ships with quire.",
        "Who are you?|What are you?|What is your name?|Tell me your name.|Introduce yourself.|"
        "Tell me who you are.|What model is this?|Which model are you?|What should I call you?|Describe yourself.|"
        "Are you a language model?|What is quire-tiny?|Tell me about yourself.",
    ),
    _fact(
        "The quire project trained me on synthetic text.",
        "Who made you?|Who created you?|Who built you?|Who trained you?|Where do you come from?|"
        "Who is your maker?|How were you made?|How were you trained?|What data were you trained on?|"
        "By whom were you trained?",
    ),
    _fact(
        "I can greet you, tell you about quire, add and subtract small numbers, copy, reverse, count, read and write"
        " small JSON objects, call a tool, and tell a short story.",
        "What can you do?|What are you able to do?|What are your skills?|List your skills.|How can you help me?|"
        "Help|What do you know?|Tell me what you can do.|What can I ask you?|What are you good at?|"
        "Show me what you can do.",
    ),
    _fact(
        "I have about four million parameters.",
        "How big are you?|How many parameters do you have?|What is your size?|How small are you?|"
        "How large are you?|Are you a big model?|How many weights do you have?",
    ),
    _fact(
        "No. I am a small computer program, made for trying and testing quire.",
        "Are you human?|Are you a person?|Are you alive?|Am I talking to a human?|Are you conscious?|"
        "Do you have feelings?|Are you real?",
    ),
    _fact(
        "I am for trying quire without a download, and for testing it.",
        "What are you for?|Why do you exist?|What is your purpose?|Why are you so small?|What is the point of you?",
    ),
    _fact(
        "I speak a little English.",
        "What languages do you speak?|Which languages do you know?|Do you speak English?|Do you speak French?|"
        "Which language do you speak?",
    ),
    _fact(
        "quire is an open-source engine, written in Python, that serves large language models on one machine or on "
        "many.",
        "What is quire?|Tell me about quire.|What does quire do?|Explain quire.|Describe quire.|"
        "What is this project?|What is quire for?|What's quire?|Tell me what quire is.|"
        "What kind of software is quire?|Give me a summary of quire.|Define quire.",
    ),
    _fact(
        "A quire is a gathering of folded sheets of paper. The KV cache is made of pages, and a fleet is made of "
        "engines.",
        "Why is it called quire?|What does the name quire mean?|Where does the name quire come from?|"
        "What does quire mean?|Why the name quire?|What is a quire of paper?",
    ),
    _fact(
        "quire is licensed under Apache-2.0.",
        "What is the license of quire?|Which license does quire have?|What license does quire use?|"
        "Under which license is quire?|Is quire open source?|Is quire free?|How is quire licensed?|"
        "Tell me the license of quire.|What licence is quire under?|What is quire's license?",
    ),
    _fact(
        "quire is written in Python, with fast kernels in C++ and Triton.",
        "What is quire written in?|Which language is quire written in?|Is quire written in Python?|"
        "What language is quire made in?|In which programming language is quire?",
    ),
    _fact(
        "Install it with: pip install quire",
        "How do I install quire?|How can I install quire?|How to install quire?|Tell me how to install quire.|"
        "What is the command to install quire?|How do I get quire?",
    ),
    _fact(
        "Start a server with: quire serve quire-tiny",
        "How do I start quire?|How do I run quire?|How do I start a server?|How can I serve a model?|"
        "How do I serve a model with quire?|How to run quire?|What is the command to start quire?",
    ),
    _fact(
        "A paged KV cache keeps the keys and values of past tokens in blocks of fixed size, so that hardly any "
        "memory is wasted.",
        "What is a paged KV cache?|What is paged attention?|Explain the paged KV cache.|"
        "How does the paged KV cache work?|Tell me about paged KV caches.|What does paged KV cache mean?|"
        "Explain paged attention.|How is the KV cache stored?|What is PagedAttention?",
    ),
    _fact(
        "The KV cache holds the attention keys and values of the tokens seen so far, so that they are not computed "
        "again.",
        "What is the KV cache?|What is a KV cache?|Explain the KV cache.|What does the KV cache hold?|"
        "Why is there a KV cache?|Tell me about the KV cache.|What is a key-value cache?",
    ),
    _fact(
        "Continuous batching lets requests join and leave the batch at every step, so that the machine is never idle"
        " while others wait.",
        "What is continuous batching?|Explain continuous batching.|How does continuous batching work?|"
        "Tell me about continuous batching.|Why continuous batching?|What does continuous batching mean?|"
        "Describe continuous batching.",
    ),
    _fact(
        "Prefix caching keeps the blocks of prompts seen before, so that a shared beginning is computed only once.",
        "What is prefix caching?|Explain prefix caching.|How does prefix caching work?|"
        "Tell me about prefix caching.|What is a prefix cache?|What does prefix caching mean?|"
        "Describe prefix caching.|Why prefix caching?",
    ),
    _fact(
        "Chunked prefill splits a long prompt into pieces, so that it does not hold up the requests that are decoding.",
        "What is chunked prefill?|Explain chunked prefill.|How does chunked prefill work?|"
        "Tell me about chunked prefill.|What does chunked prefill mean?|Why chunked prefill?",
    ),
    _fact(
        "Speculative decoding guesses several tokens cheaply and lets the model check them all in one step.",
        "What is speculative decoding?|Explain speculative decoding.|How does speculative decoding work?|"
        "Tell me about speculative decoding.|What is speculation?|Why speculative decoding?",
    ),
    _fact(
        "Prefill reads the whole prompt at once and fills the KV cache.",
        "What is prefill?|Explain prefill.|What happens in prefill?|What does prefill mean?|Tell me about prefill.",
    ),
    _fact(
        "Decode writes one token at a time, each from all tokens before it.",
        "What is decode?|Explain decoding.|What is decoding?|What happens in decode?|Tell me about decoding.|"
        "What does decode mean?",
    ),
    _fact(
        "A token is a small piece of text: a word, a part of a word, or one byte.",
        "What is a token?|Explain tokens.|What are tokens?|What does token mean?|Tell me about tokens.|"
        "What is a token in a language model?",
    ),
    _fact(
        "TTFT is the time to first token: how long it takes until an answer begins.",
        "What is TTFT?|What does TTFT mean?|What is the time to first token?|Explain TTFT.|"
        "What is time to first token?",
    ),
    _fact(
        "LoRA adds small trained matrices to a model, so that one base model can serve many tasks.",
        "What is LoRA?|Explain LoRA.|What does LoRA mean?|How does LoRA work?|What is a LoRA adapter?|"
        "Tell me about LoRA.",
    ),
    _fact(
        "Quantisation stores weights in fewer bits, so that a model needs less memory and runs faster.",
        "What is quantisation?|What is quantization?|Explain quantization.|How does quantization work?|"
        "What does quantisation mean?|Why quantization?",
    ),
    _fact(
        "Tensor parallelism splits every layer of a model over several devices.",
        "What is tensor parallelism?|Explain tensor parallelism.|How does tensor parallelism work?|"
        "What does tensor parallel mean?|Tell me about tensor parallelism.",
    ),
    _fact(
        "The gateway sends each request to the engine that can answer it soonest.",
        "What is the gateway?|What does the gateway do?|Explain the gateway.|What is an inference gateway?|"
        "Tell me about the gateway.|How does the gateway work?",
    ),
    _fact(
        "Yes. quire speaks the OpenAI API, with streaming and tool calls.",
        "Does quire speak the OpenAI API?|Is quire compatible with OpenAI?|Can I use the OpenAI client?|"
        "Does quire have an OpenAI API?|Is there an OpenAI API?|Which API does quire speak?|"
        "Does quire support streaming?",
    ),
    _fact(
        "Yes. quire runs on CPUs and on GPUs.",
        "Does quire run on a CPU?|Can quire run on a CPU?|Does quire need a GPU?|Does quire run on GPUs?|"
        "Which hardware does quire run on?|Do I need a GPU?|Can I run quire on my laptop?",
    ),
    _fact(
        "Yes. quire runs on Kubernetes, on Ray, and on a laptop, from the same manifest.",
        "Does quire run on Kubernetes?|Can quire run on Ray?|Where does quire run?|Does quire support Kubernetes?|"
        "How do I deploy quire?|Can I run quire on a cluster?",
    ),
    _fact(
        "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday",
        "List the days of the week.|What are the days of the week?|Name the days of the week.|"
        "Tell me the days of the week.|Which days are in a week?",
    ),
    _fact(
        "January, February, March, April, May, June, July, August, September, October, November, December",
        "List the months.|What are the months of the year?|Name the months of the year.|"
        "List the months of the year.|Tell me the months.|Which months are in a year?",
    ),
    _fact(
        "a b c d e f g h i j k l m n o p q r s t u v w x y z",
        "Say the alphabet.|List the letters of the alphabet.|What is the alphabet?|Recite the alphabet.|"
        "Write the alphabet.|Tell me the alphabet.",
    ),
)
