"""Given names that are common in Europe, the Americas, and South and East Asia, as they are written in Latin letters.
Names that are ordinary English words as well (Will, Rose, Mark) are left out: they need a cue."""

from __future__ import annotations

_NAMES = """
aaron abdul abdullah abigail adam adrian adriana agnes agnieszka ahmad ahmed aisha akira alan albert alberto alejandra
alejandro aleksandr alessandro alessia alex alexander alexandra alexei alfred alfredo ali alice alicia alina alison
allison amanda amelia amina amir amit amy ana anastasia anders andrea andreas andrei andrew andrzej andré andrés
angela angelika anil anita anja anjali ann anna anne anneliese annette annika anthony antoine anton antonia antonio
ari arjun arnold arthur arun asha ashley astrid aurelie aurélie ayesha barbara bartosz beata beatrice beatriz ben
benedikt benjamin bernard bernd bernhard bettina birgit bjoern bjorn björn bogdan boris brandon brenda brian brigitte
bruno caitlin callum camila camille carl carla carlos carmen carol carolina caroline carsten caterina catherine
cecilia charles charlie charlotte chiara chloe chloé chris christian christina christine christoph christopher claire
clara claudia claudio colin connor cristina céline dagmar daisuke damian dan daniel daniela daniele danielle david
deborah deepak denis dennis diana diego dieter dimitri dirk dmitri dominic dominik donald donna dorothy duncan ebony
eduardo edward ekaterina eleanor elena elif elisa elisabeth eliza elizabeth elke ella ellen elliot elsa emil emilia
emilio emily emma emmanuel enrico enrique eric erik erika ernesto esther eugene eva evelyn ewa fabian fatima federico
felipe felix ferdinand fernanda fernando filip finn fiona florian francesca francesco francisco francois frank franz
françois fred frederik frieda friedrich gabriel gabriela gabriele gareth gary gemma geoffrey georg george gerald
gerard gerhard gianluca gillian giorgio giovanni gisela giulia giuseppe gonzalo gordon graham greg gregor gregory
greta grzegorz guido guillaume gunter gustav gustavo günter günther hannah hans harald harry haruka hassan heather
hector heike heinrich heinz helen helena helga helmut henri henrik henry herbert hermann hiroshi holger horst howard
hugo hussein hélène ian ibrahim ignacio igor ines inga ingrid inigo ioana irene irina iris isabel isabella isabelle
ismail ivan ivana jacek jack jacob jacques jakub james jamie jan jana jane janet janine jasmine jason javier jean
jeffrey jennifer jens jeremy jerome jerry jesper jesse jessica jesus jesús jill jim jimena joan joanna joao joaquin
joe joel johan johann johanna johannes john johnny jonas jonathan jorg jorge jose josef joseph joshua josé juan juana
judith julia julian juliane julie julien juliette julio jurgen justin justyna jérôme jörg jürgen kaito karen karin
karl karolina katarina katarzyna kate katharina katherine kathleen kathryn katie katja kavita kazuki keith kelly kenji
kenneth kerstin kevin khadija khalid kim kirsten klaus konrad krzysztof kumar kurt lakshmi larry lars laura lauren
laurent lea leah leila lena leon leonard leonardo leonie leticia liam lidia lilian lina linda lisa lorenzo louis
louise luca lucas lucia lucie lucy lucía ludwig luigi luis luisa lukas luke lydia léa maarten magdalena mahmoud
malgorzata manfred manoj manuel manuela marc marcel marcin marco marcos marcus marek margaret margarita maria mariana
marianne marie marina mario marion marko marlene marta martha martin martina martín mary maría mateo mateusz mathieu
matteo matthew matthias maureen maurice mauricio max maximilian megan mehmet melanie melissa mia michael michaela
michal michel michele michelle miguel mike mikhail milan miriam mohamed mohammad mohammed monica monika moritz
muhammad mustafa mónica nadia nadine nancy naomi natalia natalie natasha nathalie nathan neha neil nicholas nick
nicola nicolas nicole nicolás niels nigel nikolai nikolas nils nina noah noemi nora norbert norman olaf oleg olga
oliver olivia olivier omar oscar oskar osman otto pablo pamela paola paolo patricia patrick patrik paul paula pauline
pavel pawel pedro peter petra philip philippe phillip pierre pietro piotr pooja priya rachel rafael raj rajesh ralf
ralph ramon rania raquel raul raymond raúl rebecca regina reinhard renate rene rené ricardo riccardo richard rita
robert roberta roberto robin rodrigo roger roland rolf roman ronald rosa rosemary roxana ruben rudolf russell ruth
ryan sabine sabrina sakura salma sam samantha samir samuel sandra sanjay santiago sara sarah sasha satoshi scott sean
sebastian sebastián selma serge sergei sergio sharon sheila shirley sibylle siegfried sigrid silke silvia simon simone
sinead sofia sofie sofía sonia sonja sophia sophie stacy stefan stefania stefanie stephan stephane stephanie stephen
steve steven stuart stéphane sunil sunita susan susana susanne suzanne sven svetlana sylvia sylvie sébastien takashi
tamara tanja tanya tara tatiana ted teresa terry theo theodor theresa thomas thorsten tiago tim timothy tina tobias
todd tom tomas tomasz toni tony tracy udo ulrich ulrike ursula uwe valentina valerie vanessa vera veronica veronika
verónica victor vijay viktor vincent vincenzo vivian vladimir volker walter waltraud wei werner wilhelm william
wolfgang xavier yasmin yolanda youssef yuki yusuf yvonne zachary zainab zoe zofia zoé
"""

GIVEN = frozenset(_NAMES.split())
