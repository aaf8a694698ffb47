"""The sentences of the stories: templates in the notation of `grammar`.

The hero's slots are plain ("{name}", "{he}"), the helper's begin with "f_". The helper
comes in with "{f_intro}", once in a story, and goes by "{f_name}" from then on. Line
breaks are spaces.
"""

from typing import NamedTuple


class Plot(NamedTuple):
    """What happens in one kind of story.

    `start` continues an opening that all plots share; `opening` stands for both.
    `family` says whether the helper may be one of the family.
    """

    start: str
    opening: str
    stages: tuple[str, ...]
    ending: str
    family: bool = False


OPENINGS = """
[[Once upon a time|Once upon a time,|Long ago,|A long time ago,|Once,|Far away,] [there
was|there lived] {intro}[.|.|. {He} lived {in_place}.|. {He} had a [warm|small|happy]
home {in_place}.|. {He} loved to [play|sing|run|read] {in_place}.] [One|One|One
[warm|cold|fine]] [day|morning|evening|afternoon][,|] |Once there was {intro} who
[lived|worked|played] {in_place}. One day, |In a [small|little|tall|white] house
{in_place} lived {intro}. One [day|morning|night], |{Intro} lived {in_place}. [{He} was
[kind and brave|always happy|a little shy|never sad]. |]One [day|morning], |[One|One|One
[warm|cold|sunny|quiet]] [day|morning|evening|night][,|] |[Last summer,|Last winter,|It
was a [sunny|cold|quiet|windy] [day|morning], and|In the [spring|autumn],|Late one
night,|On a [sunny|cold] morning,] |[Yesterday|This morning|Early in the morning][,|]
|[{Name} and {his} [mother|father|sister|brother] lived {in_place}.|{Name} lived
{in_place} and liked [to sing|to help|long walks|good food].|{Name} was [very|so]
[happy|bored|busy|hungry|tired].|{Name} [had|wanted] a [big|good|happy] day.] That
[day|morning], ]
"""
WEATHER = """
[The sun was [shining|warm|bright].|The wind was [cold|strong|soft].|It was
[raining|snowing|warm] outside.|The sky was [blue|gray|full of clouds].|The birds were
singing.|The snow was [deep|white].|Nobody else was there.|It was very quiet.]
"""
ENDINGS = """
[From that day on, {name} and {f_name} were [best|good] friends.|{Name} and {f_name}
[laughed|danced|sang] [together |]until the [sun went down|moon came up|stars came
out].|Then they [both |]went home, [happy and tired|tired but happy|hand in hand].|That
night, {name} [slept well|had a [good|happy|sweet] dream|went to bed with a
smile].|"[What a [good|fine|wonderful] day|You are a good friend|I will never forget
this]!" said [{name}|{f_name}]. And they [lived happily ever after|were happy for a long
time].|[And so|In the end,] everyone was [happy|glad] again.|{Name} was [very |so
|]happy, and {f_name} was happy too. The end.|{He} never forgot how {f_name} had helped
{him}.]
"""
GREETING = """
[Then|Soon|Just then,|After a while,|At last] {f_intro} came [by|along|near|down the
road|out of the trees].
"""
SADNESS = """
[{He} was very sad.|{Name} began to cry.|{He} sat down and [cried|thought].|{He} did not
know what to do.|A tear ran down {his} face.|{Name} felt [sad|lonely|cold inside].]
"""
THANKS = """
["Thank you[, {f_short}|, my friend|]!" said {name}.|{Name} [said thank you|thanked
{f_name}] and [smiled|gave {f_him} a [big |]hug].|{Name} [laughed with joy|clapped {his}
hands|jumped for joy|was so glad].]
"""

LOST = Plot(
    "{name} [lost|could not find] {his} [{toy}|{toy}|best {toy}].",
    """
    ["Where is my {toy}?" [asked|cried|said] {name}.|{Name} had {a_toy}. {He} took it
    everywhere, but one day it was gone.|{Name} wanted to play with {his} {toy}, but it
    was not there.|{Name} said, "I have lost my {toy}!"]
    """,
    (
        """
        {He} looked [under the chair|in the kitchen|behind the house|in every room|up
        and down], [but it was not there|but could not see it|but found only
        {an_other}].
        """,
        SADNESS,
        GREETING,
        """
        "[Why are you [sad|crying]|What is wrong|Can I help you]?" asked {f_name}. "[My
        {toy} is gone|I have lost my {toy}|I cannot find my {toy}]," said {name}.
        """,
        """
        ["Let us look together," said {f_name}.|"Do not [worry|cry]," said {f_name}. "We
        will find it."|"I will help you," said {f_name}.] They went to {there} and
        looked [everywhere|for a long time|high and low].
        """,
        """
        [At last|Then|Suddenly] {f_name} [saw|found] something {hiding}. It was the
        {toy}!
        """,
        THANKS,
    ),
    """
    {Name} [took the {toy} home|held the {toy} tight|put the {toy} in a safe place] and
    never lost it again.
    """,
    family=True,
)

RESCUE = Plot(
    "{name} [was walking|went for a walk|was playing] {in_place}.",
    """
    [{Name} was walking {in_place} when {he} heard a noise.|{Name} said, "What is that
    noise?" It came from {place}.|{Name} heard a sound {in_place}. It was very
    soft.|{Name} went to {place} to look for {food}.]
    """,
    (
        """
        [Then|Suddenly|There] {he} [saw|found] a small {animal}. [It had hurt its leg|It
        was stuck in the mud|It had fallen into a deep hole|It was lost and cold].
        """,
        """
        ["Help me, please!" cried the {animal}.|"Oh no!" said {name}. "You poor
        {animal}!"|The {animal} was [very afraid|too weak to move|shaking].|"Do not be
        afraid," said {name}.]
        """,
        """
        {Name} [pulled and pulled|tried and tried], but {he} was not strong enough. So
        {he} [ran|went] to get help, and {he} [met|found] {f_intro} {in_there}.
        """,
        """
        "[Come quickly|Please help us|Please come with me]!" said {name}. "[A small|A
        little] {animal} needs help." {f_Name} [came at once|took a long rope and
        came|did not wait].
        """,
        """
        Together they [pulled the {animal} out|helped the {animal}|made the {animal}
        safe] and gave it [some {food}|some water|a warm blanket].
        """,
        """
        ["You saved me," said the {animal}.|The {animal} [smiled|was safe and
        warm].|"Now I have two good friends," said the {animal}.]
        """,
    ),
    """
    [After that, |Now ]the {animal} came to see {name} every [day|morning|week].
    """,
    family=True,
)

STORM = Plot(
    "{name} [was on {his} way|wanted to go] to {place}.",
    """
    [{Name} looked at the sky.|{Name} saw a dark cloud over {place}.|{Name} did not like
    the rain.|{Name} said, "[It will rain soon|I must go home]."] {He} was a long way
    from home.
    """,
    (
        """
        [The sky grew dark|Big clouds came|The wind began to blow], and [soon |then |]it
        began to [rain|snow]. [{He} was wet and cold.|{He} ran as fast as {he}
        could.|{He} could not see the road.]
        """,
        """
        [Then|At last] {he} saw a light {in_there}. {He} knocked on the door, and
        {f_intro} opened it.
        """,
        """
        "[Come in, come in|Come in and get warm|You are all wet]!" said {f_name}. "[Sit
        by the fire|I have some hot {food} for you|You can stay here tonight]."
        """,
        """
        [{Name} sat by the fire and ate {food}.|They ate {food} and {other_food} and
        told [stories|funny stories].|{f_Name} gave {him} a [dry|warm] blanket.]
        """,
        """
        [In the morning|After a while|Soon] the [storm was over|sun came out|sky was
        blue again].
        """,
        THANKS,
    ),
    """
    {Name} went home and told [everyone|{his} mother|{his} friends] about {f_name}.
    """,
)

BAKING = Plot(
    "{name} wanted to make [some {food}|{food} for {his} friends].",
    """
    ["I am hungry," said {name}.|{Name} said, "I want to eat {food}."|{Name} wanted to
    make {food}.|{Name} loved {food} more than anything.|{Name} was very hungry one
    day.]
    """,
    (
        """
        {He} looked in the [box|basket|kitchen], but could find [nothing|no
        {food}|only old {other_food}].
        """,
        SADNESS,
        """
        So {he} [went|walked] to {place} and met {f_intro}. "[Do you have any {food}|Can
        you help me|May I have some {food}]?" asked {name}.
        """,
        """
        "[Yes, I do|Of course|I have a lot]," said {f_name}. "[But first you must help
        me [find my {toy}|carry this {toy}|clean my house]|Let us [eat|cook]
        together|Take what you need]." [{Name} was glad to do it.|"That is fair," said
        {name}.|{Name} nodded.]
        """,
        """
        [They worked all [day|morning].|They [cooked|worked] and sang a song.|It took a
        long time, but it was fun.] [Soon|At last] they had enough {food} for
        [everyone|the whole village|two].
        """,
        """
        {Name} gave [half|the biggest part|some] to {f_name}. Everything [tasted|was]
        [very good|sweet|wonderful].
        """,
    ),
    """
    "Food is best when you share it," said {name}.
    """,
)

FEAR = Plot(
    "{name} [was afraid of|did not like] {fear}.",
    """
    [{Name} was afraid of {fear}.|{Name} was not afraid of anything but {fear}.|"I am
    afraid of {fear}," said {name}.]
    """,
    (
        """
        [The others [laughed at {him}|called {him} names].|{He} never told anyone.|So
        {he} stayed at home all day.|At night {he} hid {hiding}.]
        """,
        """
        One [day|night], {f_intro} [asked|came and asked], "[Will you come with me to
        {place}|Why do you hide|What are you afraid of]?" [{Name} shook {his} head.|"I
        am too afraid," said {name}.|{Name} looked away.]
        """,
        """
        "[I was afraid once, too|Everyone is afraid of something|Take my hand|You are
        braver than you think]," said {f_name}. "[We will go together|I will stay with
        you|Just take one small step|Close your eyes and count to three]."
        """,
        """
        [Slowly|So|Step by step] {name} [went with {f_name}|took one step, and then one
        more|followed {f_name}]. [It was not so bad.|Nothing bad happened.|{His} heart
        beat fast, but {he} did not stop.]
        """,
        """
        ["I did it!" [cried|called] {name}.|"Look at me!" said {name}.] {f_Name} was
        very proud of {him}.
        """,
    ),
    "After that day, {name} was [never|not] afraid of {fear} [again|anymore].",
    family=True,
)

QUARREL = Plot(
    "{name} found {a_toy} {in_place}.",
    """
    [{Name} wanted {a_toy}.|{Name} had {a_toy}, and {he} did not want to share
    it.|{Name} saw {a_toy} {hiding}.]
    """,
    (
        """
        [Then|But then|Soon] {f_intro} saw it, too. ["That is my {toy}!" said
        {f_name}.|"I want to play with it," said {f_name}.|"Give it to me!" said
        {f_name}.] "[No, it is mine|I saw it first|Go away]," said {name}.
        """,
        """
        They pulled [and pulled |]until the {toy} [broke|fell into the water|flew away].
        [Now nobody had a {toy}.|They were both very sad.|They looked at each other.]
        """,
        """
        "I am sorry," said [{name}|{f_name}]. "[It was my fault|I was not kind|I should
        have shared]." "[I am sorry, too|Let us be friends]," said the other.
        """,
        """
        [So they worked together and made a new one.|Together they [found|made] a better
        {toy}.|They went to {there} and got a new {toy}.]
        """,
        "Now they [took turns|played together|shared it] every day.",
    ),
    "A friend is better than {a_toy}.",
)

GIFT = Plot(
    "{name} wanted to give {his} friend a gift.",
    """
    [{Name} had a good friend.|{Name} loved to make gifts.|It was a special day for
    {name}'s best friend.|{Name} wanted to make a gift for a friend.]
    """,
    (
        "{His} friend was {f_intro}, and it was {f_his} birthday.",
        """
        [But {name} had no money.|But what could {he} give?|{Name} thought and thought.]
        {He} went to {there} and looked [around|for something nice]. [There {he} found
        {a_toy}, but it was broken.|There {he} found an old {toy}.|{He} saw {a_toy}
        {hiding}.]
        """,
        """
        {Name} took it home and [cleaned it|painted it|fixed it] all
        [night|day|evening]. [Now it looked new.|It was hard work.|It was the best {toy}
        {he} had ever seen.]
        """,
        """
        [The next day|In the morning], {he} gave the {toy} to {f_name}. "[Did you make
        this for me|Is this for me]?" asked {f_name}. "[Yes|Yes, it is for
        you]," said {name}. [{He} smiled.|]
        """,
        """
        "[I love it|It is beautiful|This is the best gift of all]!" [said|cried]
        {f_name}.
        """,
    ),
    "They ate {food} together and sang a song.",
    family=True,
)

LONELY = Plot(
    "{name} [felt lonely|had nobody to play with|sat alone {in_place}].",
    """
    [{Name} was new in the village, and {he} had no friends.|{Name} had no
    friends.|{Name} said, "I have nobody to play with."|{Name} sat alone
    {in_place}.|{Name} wanted a friend.]
    """,
    (
        """
        "[Will you play with me|Will you be my friend]?" {he} asked the {animal}. "[No,
        I am too busy|Not today|I have to go home]," said the {animal}.
        """,
        SADNESS,
        """
        [Then|But then|The next day] {he} [heard a song|heard somebody laugh|saw
        somebody] {in_there}. It was {f_intro}.
        """,
        """
        "[Hello|Good morning], I am {f_a_short}," said {f_name}. "Who are you?" "I am
        {a_short}," said {name}.
        """,
        """
        "Do you like [to sing|to play ball|{food}|stories]?" asked {f_name}. "[Yes, I
        do|Yes, very much|I love it]!" said {name}.
        """,
        """
        [They played all day.|They ran and jumped and laughed.|They shared {food} under
        a big tree.] {Name} was not lonely [anymore|now].
        """,
    ),
    """
    "[See you tomorrow|Come back tomorrow]!" called {f_name}.
    """,
)

SEED = Plot(
    "{name} found a small [seed|brown seed] {in_place}.",
    """
    [{Name} had a small seed.|{Name} wanted to grow a [tree|flower].|{Name} put a seed
    in the ground.]
    """,
    (
        """
        ["What will it be?" {he} [asked|thought].|{He} put it in the ground and
        waited.|{He} gave it water every [day|morning].] [But nothing happened.|Days
        went by, but nothing grew.|It did not grow at all.]
        """,
        GREETING,
        """
        "[It will never grow|Why does it not grow]," said {name}. "[Wait a little
        longer|Give it time|It needs sun and water]," said {f_name}.
        """,
        """
        So {name} [waited|came back every day|sang to it]. [The sun was warm, and the
        rain came.|{f_Name} helped {him} carry water.|One week went by, and then two.]
        """,
        """
        [Then one morning|At last] there was a [small green leaf|little flower|tiny
        tree]! "[Look|Come and see]!" [cried|called] {name}.
        """,
        """
        It grew and grew until it was as tall as [the house|a man|{name}]. [It gave
        sweet {fruit} to everyone.|Birds came to live in it.|They sat under it and ate
        {food}.]
        """,
    ),
    """
    "Good things take time," said {f_name}.
    """,
    family=True,
)

HOME = Plot(
    "{name} [went|walked] too far [from home|from {place}].",
    """
    [{Name} was lost.|{Name} could not find the way home.|"Where am I?" asked
    {name}.|{Name} wanted to see the world.]
    """,
    (
        """
        {He} walked and walked[, past {there}|, over a hill|], [but every tree looked
        the same|but the road came to an end|and soon it was dark].
        """,
        SADNESS,
        GREETING,
        """
        "[Are you lost|Where do you live|Where are you going]?" asked {f_name}. "[I want
        to go home|I live {in_there}|I do not know the way]," said {name}.
        """,
        """
        "[I know the way|Follow me|Look at the stars]," said {f_name}. "[It is not
        far|We must go past {there}|They will show us the way]."
        """,
        """
        They [went over the bridge|followed the river|walked by the light of the moon]
        and [talked|sang a song|told stories]. [Soon|At last] {name} saw {his}
        [house|home|own door].
        """,
        """
        "[You are home|Here we are]," said {f_name}.
        """,
        THANKS,
    ),
    "{Name} was never so glad to be home, and {he} ate a big bowl of {food}.",
)

BUILD = Plot(
    "{name} [wanted to build a {craft}|had a big idea].",
    """
    ["I will build a {craft}," said {name}.|{Name} wanted to build a {craft}.|{Name}
    said, "I have an idea!"]
    """,
    (
        """
        {He} [took|found] some [wood|paper|old wood] and began to [build|make] a
        {craft}. [But it fell apart.|But it was too hard.|It did not work.] ["I will try
        again," said {name}.|{He} tried again, but it broke.|{He} was not happy with
        it.]
        """,
        GREETING,
        """
        "[What are you making|What is this]?" asked {f_name}. "[It is|I am making] a
        {craft}, but [it is no good|it always breaks|I cannot do it]," said {name}.
        """,
        """
        "[Use this {toy}|You need a strong rope|Make it bigger|Two are better than
        one]," said {f_name}. "[I will hold it|I will show you|I can help you]."
        """,
        """
        They worked [side by side|until night|all week]. [Soon|At last] the {craft} was
        ready. It was [big and strong|{color} and beautiful|better than any other].
        """,
        """
        They [took it|went with it] to {place}, and everyone [came to see it|wanted to
        try it|said it was wonderful].
        """,
    ),
    """
    "We made it together," said {name} with a smile.
    """,
    family=True,
)

MAGIC = Plot(
    "{name} found a [strange|magic|shining] {toy} {in_place}.",
    """
    [{Name} had a magic {toy}.|{Name} found a strange {toy} {hiding}.|{Name} opened the
    old box and saw a {toy}.]
    """,
    (
        """
        "[I am a magic {toy}|I can give you one wish]," said the {toy}. "[Think
        well.|What do you wish for?]"
        """,
        """
        {Name} [thought for a long time|did not know what to say]. "[I wish for {food}|I
        wish I had {an_other}|I wish I could fly]," {he} [thought|began], but {he} did
        not say it yet.
        """,
        """
        [Then|Just then] {he} saw {f_intro}, who was [sad|very sick|cold and hungry].
        "[What is wrong|Are you all right]?" asked {name}. "[I have no home|I have
        nothing to eat|I am so cold]," said {f_name}.
        """,
        """
        "I know my wish," said {name}. "Please help {f_name}!" [There was a bright
        light|The {toy} began to sing|The {toy} shone like the sun], and {f_name} was
        [well and happy|warm and safe].
        """,
        """
        ["You are so kind," said {f_name}.|{f_Name} could not believe it.|{f_Name}
        danced with joy.] ["I have a new friend. That is better," said {name}.|And the
        {toy} never spoke again.|]
        """,
    ),
    "{Name} kept the {toy} all {his} life.",
)

PLOTS = (
    LOST,
    RESCUE,
    STORM,
    BAKING,
    FEAR,
    QUARREL,
    GIFT,
    LONELY,
    SEED,
    HOME,
    BUILD,
    MAGIC,
)
