from toppings.command import main

main()
